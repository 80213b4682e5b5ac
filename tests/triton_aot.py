"""Compiles every Triton kernel for GPUs that need not be there, and prints what each kernel takes of them.

    python tests/triton_aot.py --capability 80 90

The backend runs on the CPU with the sizes of the default field, and compiles whatever it would launch. One line of JSON
per kernel: registers per thread, bytes of stack per thread (registers that did not fit), bytes of shared memory per
block, and where ``--keep FOLDER`` is given the assembly there.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from torch.nn import Parameter
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from infnerf_ns.field import FieldConfig
from infnerf_ns.kernels import (
    Groups,
    TreePaths,
    adam_triton,
    bank_gradient,
    enable_bank_gradient,
    mlp_page_size,
    triton_ops,
)
from infnerf_ns.pages import PageLayout

NODES = 2
PRECISIONS = ("ieee", "tf32", "bf16")
POINTERS = {torch.float32: "*fp32", torch.float64: "*fp64", torch.int64: "*i64", torch.uint8: "*u8"}


def run_every_kernel(
    launch: Callable, config: FieldConfig, levels: int = 4, samples: int = 4096, precisions: tuple = PRECISIONS
) -> None:
    """A training step's launches for a field of these sizes; ``launch(name, kernel, grid, device, ...)`` gets them."""
    pages = PageLayout(config, node_resolution=512, max_level=levels - 1)
    unit, path = torch.rand(samples, 3), torch.zeros(samples, levels, dtype=torch.long)
    radii, rows = torch.rand(samples), torch.zeros(samples, dtype=torch.long)
    coords = torch.zeros(NODES * levels, 3, dtype=torch.long)
    paths = TreePaths(unit, path, coords, [NODES * level for level in range(levels)])
    groups = Groups(torch.tensor([0, samples]), *torch.zeros(3, 1, dtype=torch.long))

    def banks(sizes: list[int]) -> list[Parameter]:
        made = [Parameter(torch.empty(NODES, size)) for size in sizes]
        for bank in made:
            enable_bank_gradient(bank)
        return made

    def under(name: str, run: Callable) -> None:
        noted = lambda *arguments, **constants: launch(name, *arguments, **constants)  # noqa: E731
        triton_ops.launch = adam_triton.launch = noted
        result = run()
        if result is not None and result.requires_grad:
            result.sum().backward()

    grids = banks([layout.page_size for layout in pages.grids])
    proposals = banks([layout.page_size for layout in pages.proposals])
    cells = [layout.scales for layout in pages.grids]
    children, gsd = torch.zeros(NODES * levels, 8, dtype=torch.long), [1.0] * levels
    under("route", lambda: triton_ops.route(unit, radii, children, gsd, path))
    under("route, finest", lambda: triton_ops.route(unit, None, children, gsd, path))
    moving = unit.clone().requires_grad_()
    under("hash_encode", lambda: triton_ops.hash_encode(moving, rows, grids[0], pages.grids[0]))
    width = pages.density_widths[0]
    for name, footprints in (("path_features", radii), ("path_features, not weighted", None)):
        under(
            name,
            lambda footprints=footprints: triton_ops.path_features(
                paths, [0] * levels, footprints, cells, grids, pages.grids, width
            ),
        )
    cells_of_proposals = [layout.scales for layout in pages.proposals]
    for name, footprints in (("path_sum", radii), ("path_sum, not weighted", None)):
        under(
            name,
            lambda footprints=footprints: triton_ops.path_sum(
                paths, footprints, cells_of_proposals, proposals, pages.proposals
            ),
        )

    page = mlp_page_size(pages.density_widths) + mlp_page_size(pages.color_widths)
    decoders = banks([page] * levels)
    for precision in precisions:
        triton_ops._precision = lambda precision=precision: precision
        widest = (64, *[triton_ops._limits(precision).most_width] * 2, 3)
        for name, offset, widths, weights in (
            ("density", 0, pages.density_widths, decoders),
            ("color", mlp_page_size(pages.density_widths), pages.color_widths, decoders),
            ("widest", 0, widest, banks([mlp_page_size(widest)] * levels)),
        ):
            inputs = torch.rand(samples, widths[0], requires_grad=True)
            under(
                f"{name}, {precision}",
                lambda inputs=inputs, offset=offset, widths=widths, weights=weights: triton_ops.grouped_mlp(
                    inputs, groups, weights, offset, widths
                ),
            )
    group = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-15, "warmup": 100}
    bank, held = decoders[0].detach(), bank_gradient(decoders[0])
    state = {"exp_avg": torch.empty_like(bank), "exp_avg_sq": torch.empty_like(bank)}
    state["row_steps"] = torch.zeros(NODES, dtype=torch.int64)
    factor, left_out = torch.ones(()), torch.zeros((), dtype=torch.int64)
    under("NodeAdam", lambda: adam_triton.step(bank, held, state, group, factor, left_out))
    under("NodeAdam", lambda: adam_triton.square(held))
    under("NodeAdam", lambda: adam_triton.clear(held))


def source_of(kernel, arguments: tuple, constants: dict) -> tuple[ASTSource, dict]:
    """What Triton's launcher would compile for these arguments, and the options among them."""
    options = {name: constants[name] for name in ("num_warps", "num_stages") if name in constants}
    constants = {name: value for name, value in constants.items() if name not in options}
    names = [name for name in kernel.arg_names if name not in constants]
    assert len(names) == len(arguments), kernel
    signature, divisible = {}, {}
    for name, value in zip(names, arguments):
        specialised = not kernel.params[kernel.arg_names.index(name)].do_not_specialize
        if isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1 and specialised:
            constants[name] = 1
        else:
            signature[name] = "i32"
        if isinstance(value, torch.Tensor) or isinstance(value, int) and value % 16 == 0 and specialised:
            divisible[(kernel.arg_names.index(name),)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(constants, "constexpr")
    signature = {name: signature[name] for name in kernel.arg_names}
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=divisible), options


def usage(cubin: bytes) -> dict[str, int]:
    """Registers and stack per thread of a compiled kernel, as cuobjdump tells them."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name.lower(): int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL")}


def main() -> None:
    """Compiles and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--capability", type=int, nargs="+", default=[80, 90])
    parser.add_argument("--only", default="", help="kernels whose name has this in it")
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()

    def compile_it(name: str, kernel, grid, device, *arguments, **constants) -> None:
        del device
        assert all(size > 0 for size in grid)
        name = f"{name}: {kernel.__name__.strip('_')}"
        if options.only not in name:
            return
        for capability in options.capability:
            source, settings = source_of(kernel, arguments, constants)
            compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=settings)
            figures = {"shared": compiled.metadata.shared, **usage(compiled.asm["cubin"])}
            print(json.dumps({"kernel": name, "capability": capability, **figures}), flush=True)
            if options.keep:
                for kind in ("ttgir", "ptx"):
                    file = options.keep / f"{name.replace(', ', '_').replace(': ', '_')}.{capability}.{kind}"
                    file.write_text(compiled.asm[kind])

    run_every_kernel(compile_it, FieldConfig(log2_table_size=19))
    # Triton compiles a kernel anew for an argument of 1: one sample, one level, one hash level and feature.
    least = FieldConfig(hash_levels=1, features_per_level=1, color_hidden_layers=1)
    smallest = lambda name, *arguments, **constants: compile_it(f"smallest {name}", *arguments, **constants)  # noqa: E731
    run_every_kernel(smallest, least, levels=1, samples=1, precisions=("ieee",))


if __name__ == "__main__":
    main()
