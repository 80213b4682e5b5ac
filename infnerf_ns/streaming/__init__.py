"""Rendering in O(log n): page files, a node cache with a byte budget, view-dependent node selection (design section
8)."""
