"""An independent reference: torchtitan 0.3.0's DeepSeek-V3 debug model with its MTP module, with
three of its six layers.

Both sides have the same weights and batch. In fp32 throughout, both losses agree to 5 digits and
every gradient within 1e-4 of its norm (other orders of summation, complex instead of real RoPE).
With torchtitan's experts in bf16, as shipped: 3 digits.

torchtitan passes the hidden states before the final norm to its MTP module, Phalanx those after it,
as DeepSeek does. If the final norm's weight is constant the two are equal, because the module
begins with a norm. So the final norm's weight stays 1 here, and its gradient, which in Phalanx
includes a part from the MTP loss, is left out.
"""

from importlib.metadata import PackageNotFoundError, version

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from configs.model import AttentionConfig, ModelConfig, MoEConfig, RopeConfig
from models.decoder import Decoder
from models.documents import DocumentAttention
from models.init import initialize
from models.router import routers
from tests.runs import run
from train.data.batches import Batch
from train.loss import loss_sums

DEBUG_MODEL = ModelConfig(
    vocab_size=2048, d_model=256, n_layers=3, n_dense_layers=1, d_ff=1024, tie_embeddings=False,
    norm_eps=1e-6, init_std=0.05, mtp_depth=1,
    attention=AttentionConfig(kind="mla", n_heads=16, kv_lora_rank=512, qk_nope_head_dim=128,
                        qk_rope_head_dim=64, v_head_dim=128),
    rope=RopeConfig(interleaved=True, scaling="yarn", factor=40.0, original_length=4096, mscale=0.7,
              mscale_all_dim=0.7),
    moe=MoEConfig(n_experts=8, top_k=3, d_expert=256, n_shared_experts=2, norm_top_k=False),
)  # fmt: skip


def installed() -> str:
    try:
        return version("torchtitan")
    except PackageNotFoundError:
        return "none"


pytestmark = pytest.mark.skipif(
    installed() != "0.3.0", reason=f"needs torchtitan 0.3.0, found {installed()}"
)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Decoder, Tensor, dict[str, Tensor]]:
    """Our model, its loss sums (after backward), and torchtitan's results."""
    folder = tmp_path_factory.mktemp("titan")
    decoder = Decoder(DEBUG_MODEL)
    initialize(decoder, DEBUG_MODEL, seed=5)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if name.endswith("norm.weight") and name != "norm.weight":
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
        for router in routers(decoder):
            router.bias_E.add_(torch.randn(8, generator=generator), alpha=0.05)
    window = torch.randint(0, 2048, (2, 49), generator=generator)
    tokens, targets = window[:, :-1].contiguous(), window[:, 1:].contiguous()
    positions = torch.arange(48).expand(2, 48)
    batch = Batch(
        tokens.flatten(), positions.flatten(), targets.flatten(), DocumentAttention(positions), 96
    )
    state = {name: value.contiguous() for name, value in decoder.state_dict().items()}
    save_file(state | {"tokens": tokens, "targets": targets}, folder / "given.safetensors")
    run("tests/models/torchtitan/torchtitan_peer.py", folder)
    losses = loss_sums(decoder, batch, 1)
    losses.sum().backward()
    return decoder, losses.detach(), load_file(folder / "theirs.safetensors")


def test_the_same_losses_and_gradients_in_fp32(
    both: tuple[Decoder, Tensor, dict[str, Tensor]],
) -> None:
    decoder, losses, theirs = both
    torch.testing.assert_close(losses, theirs["losses"], rtol=1e-5, atol=0)
    seen = {"norm.weight"}
    for name in theirs.keys() - {"losses", "as_shipped", "norm.weight"}:
        ours, _, index = name.partition("/")
        gradient, expected = decoder.get_parameter(ours).grad, theirs[name]
        assert gradient is not None
        found = gradient.select(-3, int(index)) if index else gradient
        assert (found - expected).norm() < 1e-4 * expected.norm(), name
        seen.add(ours)
    assert seen == dict(decoder.named_parameters()).keys()


def test_three_digits_with_its_experts_in_bf16(
    both: tuple[Decoder, Tensor, dict[str, Tensor]],
) -> None:
    _, losses, theirs = both
    torch.testing.assert_close(losses, theirs["as_shipped"], rtol=1e-3, atol=0)
    assert not torch.allclose(losses, theirs["as_shipped"], rtol=1e-7, atol=0), (
        "bf16 leaves a trace"
    )
