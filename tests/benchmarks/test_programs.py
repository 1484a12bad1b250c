"""Facts about compiled programs, of programs in which they are known."""

import jax
import jax.numpy as jnp

from benchmarks import programs

HLO = """
HloModule example

%body (x: f32[8,4]) -> f32[8,4] {
  ROOT %add.1 = f32[8,4]{1,0} add(%x, %x)
}

ENTRY %main (x: f32[8,4]) -> f32[8,4] {
  %x = f32[8,4]{1,0} parameter(0)
  %loop = (f32[8,4]{1,0}, f32[8,4]{1,0}) fusion(%x), kind=kLoop, calls=%body
  %small = f32[4]{0} reduce(%x), dimensions={0}
  %sum = f32[4]{0} all-reduce(%small), to_apply=%add
  %all = bf16[2,4]{1,0} all-gather(%small), dimensions={0}
  ROOT %tuple.1 = (f32[8,4]{1,0}) tuple(%loop)
}
"""


def test_large_results():
    assert programs.large_results(HLO, 32) == 2
    assert programs.large_results(HLO, 4) == 5
    assert programs.large_results(HLO, 33) == 0


def test_collectives():
    counts, num_bytes = programs.collectives(HLO)
    assert counts == {"all-reduce": 1, "all-gather": 1}
    assert num_bytes == 4 * 4 + 8 * 2


def test_residual_bytes():
    def double_sine(scale, x):
        return jnp.sin(x) * scale, None

    # Of sin its cosine, and of the product both factors.
    x = jnp.ones((16, 4))
    kept = programs.residual_bytes(double_sine, jnp.ones(()), x)
    assert kept == 2 * x.nbytes + 4


def test_temporary_bytes():
    x = jnp.ones((256, 256))
    compiled = jax.jit(lambda x: (x @ x) @ x).lower(x).compile()
    assert programs.temporary_bytes(compiled) >= x.nbytes


def test_traffic():
    instructions, num_bytes, mask_bytes = programs.traffic(HLO)
    # The loop, both reductions and the gathering: 128 bytes in, 256 out; 128 and 16; 16
    # and 16; 16 and 16.
    assert instructions == 4
    assert num_bytes == (128 + 256) + (128 + 16) + (16 + 16) + (16 + 16)
    assert mask_bytes == 0
    masked = HLO.replace(
        "(f32[8,4]{1,0}, f32[8,4]{1,0}) fusion", "pred[8,4]{1,0} fusion"
    )
    assert programs.traffic(masked) == (4, num_bytes - 256 + 32, 32)


def test_of_a_sliced_operand_the_slice_is_read():
    body = """%body (x: f32[8,4]) -> f32[8,4] {
  %x = f32[8,4]{1,0} parameter(0)
  %slice.1 = f32[2,4]{1,0} slice(%x), slice={[0:2], [0:4]}
"""
    begin = HLO.index("%body (x")
    end = HLO.index("}\n\nENTRY")
    whole, sliced = (
        programs.traffic(hlo).num_bytes for hlo in (HLO, HLO[:begin] + body + HLO[end:])
    )
    assert whole - sliced == 128 - 32
