"""Contrastive and masked-language losses against those of transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batches import build, example
from polygpt.objectives.base import TokenScores
from polygpt.objectives.contrastive import Compared
from polygpt.objectives.info_nce import InfoNCE
from polygpt.objectives.masked_lm import MaskedLM, MaskTokens
from polygpt.objectives.siglip import SigLIP

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = SIZES | {"vocab_size": 40, "max_position_embeddings": 8}
VISION = SIZES | {"image_size": 8, "patch_size": 4}
ROWS = 6


def their_loss(config, model, **special):
    torch.manual_seed(0)
    model = model(config).eval()
    tokens = torch.randint(3, 39, (ROWS, 8))
    outputs = model(input_ids=tokens, pixel_values=torch.randn(ROWS, 3, 8, 8), return_loss=True)
    return model, {name: getattr(outputs, name).detach().numpy() for name in ("loss", "text_embeds", "image_embeds")}


def ours(objective, found, scale, bias=0.0):
    compared = Compared(
        jnp.asarray(found["image_embeds"]), jnp.asarray(found["text_embeds"]), jnp.ones(ROWS, bool), scale, bias
    )
    return float(objective.sum_over(compared)) / ROWS


def test_info_nce_is_the_loss_of_clip():
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=12)
    model, found = their_loss(config, transformers.CLIPModel)
    loss = ours(InfoNCE(("a", "b")), found, float(model.logit_scale.detach().exp()))
    np.testing.assert_allclose(loss, found["loss"], rtol=1e-5)


def test_siglip_is_the_loss_of_siglip():
    config = transformers.SiglipConfig(text_config=TEXT, vision_config=VISION)
    model, found = their_loss(config, transformers.SiglipModel)
    loss = ours(SigLIP(("a", "b")), found, float(model.logit_scale.detach().exp()), float(model.logit_bias.detach()))
    np.testing.assert_allclose(loss, found["loss"], rtol=1e-5)


def test_masked_lm_is_the_loss_of_bert():
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(transformers.BertConfig(**TEXT)).eval()
    batch = build([[example(8, seed=1)], [example(8, seed=2)]], 8, adapters={})
    view = MaskTokens(mask_token=39, vocabulary=31, rate=0.5)
    seen = view(batch, jax.random.split(jax.random.key(0), 2))
    weight = np.asarray(seen.weight_BT)
    labels = np.where(weight > 0, batch.tokens_BT, -100)
    outputs = model(input_ids=torch.tensor(np.asarray(seen.tokens_BT)).long(), labels=torch.tensor(labels).long())
    logits = outputs.logits.detach().numpy()
    target = np.take_along_axis(logits, np.asarray(seen.target_BT)[..., None], axis=-1)[..., 0]
    scores = TokenScores(jax.nn.logsumexp(logits, axis=-1), target, None)
    total = np.sum(weight * MaskedLM(view).per_token(scores))
    assert weight.sum() > 3
    np.testing.assert_allclose(total / weight.sum(), outputs.loss.item(), rtol=1e-5)
