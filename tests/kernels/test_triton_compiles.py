"""Every Triton kernel compiles to machine code for Hopper, with the launch configurations used there; no GPU needed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .native import needs_triton
from .offsets import narrow_offsets

# of each module of kernels/ every kernel: names repeat, modules do not hide each other's
KERNELS = {
    "experts.triton_permutation": "gather_kernel sum_kernel sum_gradient_kernel",
    "gated_linear_attention.triton_chunks": "gated_states_kernel gated_output_kernel gated_gradient_kernel",
    "linear_cross_entropy.triton_entropy": "entropy_kernel",
    "long_convolution.triton_fourier": "rows_kernel tokens_kernel tokens_gradient_kernel spectra_kernel",
    "long_convolution.triton_toeplitz": "band_kernel band_taps_kernel",
    "modal_convolution.triton_readout": "modal_readout_kernel modal_moments_kernel",
    "modal_convolution.triton_walks": "walk_kernel mode_gradient_kernel pass_kernel",
    "norms.triton_norm": "norm_kernel norm_gradient_kernel",
    "rotary.triton_rotary": "rotate_kernel",
    "selective_scan.triton_backward": "backward_kernel",
    "selective_scan.triton_forward": "summary_kernel pass_kernel scan_kernel",
    "selective_scan.triton_readout": "scan_enter_kernel scan_enter_gradient_kernel",
    "short_convolution.triton_convolution": "convolve_kernel gradient_kernel",
    "state_space_dual.triton_chunks": "states_kernel pass_kernel output_kernel gradient_kernel",
    "swiglu.triton_swiglu": "swiglu_kernel swiglu_gradient_kernel",
    "triton_readout": "readout_kernel readout_gradient_kernel",
    "wkv4.triton_state": "wkv4_state_kernel wkv4_state_gradient_kernel",
    "wkv4.triton_wkv4": "wkv4_kernel wkv4_gradient_kernel",
    "wkv7.triton_chunks": "systems_kernel transition_kernel pass_kernel output_kernel",
    "wkv7.triton_gradients": "output_gradient_kernel state_gradient_kernel pair_gradient_kernel",
}
CONTROL = ("tests.kernels.narrow_offsets", "narrow_kernel")

NARROW = """
tt.func public @kernel(%x: !tt.ptr<f32>, %y: !tt.ptr<f32>, %stride: i32, %length: i32) {
  %c32_i32 = arith.constant 32 : i32
  %row = tt.get_program_id x : i32
  %c = tt.make_range {end = 32 : i32, start = 0 : i32} : tensor<32xi32>
  %at = arith.muli %row, OPERAND : i32
  %p = tt.addptr %x, %at : !tt.ptr<f32>, i32
  %wide = arith.extsi %at : i32 to i64
  %q = tt.addptr %p, %wide : !tt.ptr<f32>, i64
  scf.for %i = %c32_i32 to %length step %c32_i32  : i32 {
    %far = arith.muli %i, %stride : i32
    %s = tt.splat %far : i32 -> tensor<32xi32>
    %z = tt.addptr %y, %s : !tt.ptr<f32>, tensor<32xi32>
  }
}
"""


def test_every_kernel_of_the_tree_is_named() -> None:
    """So that a new one is compiled, and its offsets are looked at, as well."""
    import longstride.kernels

    root = Path(longstride.kernels.__path__[0])
    found = {}
    for path in root.rglob("triton_*.py"):
        if names := re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE):
            found[".".join(path.relative_to(root).with_suffix("").parts)] = set(names)
    assert found == {module: set(names.split()) for module, names in KERNELS.items()}


def test_narrow_products_are_found_behind_extensions_and_loops() -> None:
    assert len(narrow_offsets(NARROW.replace("OPERAND", "%stride"))) == 3
    assert len(narrow_offsets(NARROW.replace("OPERAND", "%c32_i32"))) == 1  # a block of 32 elements


@needs_triton
@pytest.mark.slow
def test_all_kernels_compile_for_hopper() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.hopper"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if "registers" in line]
    compiled = {tuple(line.split()[:2]) for line in lines}
    wanted = {(module, name) for module, names in KERNELS.items() for name in names.split()}
    assert compiled == wanted | {CONTROL}
    for line in lines:
        shared, narrow = (int(number) for number in re.findall(r"(\d+) shared +(\d+) narrow", line)[0])
        assert shared <= 227 * 1024, line  # what a program can have on an H100
        assert (narrow > 0) == (tuple(line.split()[:2]) == CONTROL), line
