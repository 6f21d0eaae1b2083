"""OFT's own: its formulas and block sizes, the ball of COFT, which files are refused.

What it shares with the other methods is in test_round_trip.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.oft.layer import OFTLayer, OFTRotationModule
from torch import Tensor

from peftcore import (
    CheckpointError,
    ConfigError,
    OFTConfig,
    PeftModel,
    UnsupportedError,
    config_from_dict,
    get_peft_model,
)
from peftcore.base import BaseModel
from peftcore.methods.oft import OFTPart, rotations
from peftcore.program import compile_adapter
from tests import tiny
from tests.peftcore.worlds import SavedAdapter, quiet

IDS = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(5))
KEY = "base_model.model.model.layers.0.self_attn.q_proj.oft_R.weight"


def saved(folder: Path, **options: Any) -> SavedAdapter:
    with quiet():
        config = peft.OFTConfig(target_modules=["q_proj"], oft_block_size=8, **options)
    return SavedAdapter.read(tiny.save_random_adapter(tiny.llama(), config, folder))


def skew(n: int, b: int) -> tuple[Tensor, Tensor]:
    """Angles as in a file and the skew-symmetric matrices of them."""
    angles = torch.randn(n, b * (b - 1) // 2, generator=torch.Generator().manual_seed(1)) * 0.2
    rows, columns = torch.triu_indices(b, b, 1)
    q = torch.zeros(n, b, b)
    q[:, rows, columns] = angles
    return angles, q - q.mT


@pytest.mark.parametrize("num_terms", [None, 1, 2, 3, 4, 5, 6, 9])
def test_rotations_are_pefts(num_terms: int | None) -> None:
    angles, q = skew(3, 6)
    module = OFTRotationModule(3, 15, 6, 18)
    expected = module._cayley_batch(angles, 6, num_terms is not None, num_terms or 5)
    config = OFTConfig(
        use_cayley_neumann=num_terms is not None, num_cayley_neumann_terms=num_terms or 5
    )
    torch.testing.assert_close(rotations(q, config), expected)


def test_the_exact_rotation_is_orthogonal_and_the_series_nearly() -> None:
    _, q = skew(2, 8)
    exact = rotations(q, OFTConfig(use_cayley_neumann=False))
    torch.testing.assert_close(exact @ exact.mT, torch.eye(8).expand(2, 8, 8))
    series = rotations(q * 0.1, OFTConfig(num_cayley_neumann_terms=9))
    torch.testing.assert_close(series, rotations(-q * 0.1, OFTConfig(use_cayley_neumann=False)))


@pytest.mark.parametrize("width", [1, 7, 24, 64, 96])
def test_block_sizes_that_do_not_divide_are_adjusted_as_in_peft(width: int) -> None:
    for wanted in range(1, width + 9):
        fits = width % wanted == 0
        nearest = wanted if fits else OFTLayer.adjust_oft_parameters(None, width, wanted)
        assert OFTConfig(oft_block_size=wanted).block_size(width) == nearest
        assert OFTConfig(r=wanted, oft_block_size=0).block_size(width) == width // nearest


@pytest.mark.parametrize("options", [{}, {"block_share": True}, {"coft": True, "eps": 0.3}])
def test_merging_gives_pefts_weights(options: dict[str, Any], tmp_path: Path) -> None:
    saved(tmp_path, **options)
    with quiet():
        theirs = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path).merge_and_unload()
    ours = PeftModel.from_pretrained(tiny.llama(), tmp_path).merge_and_unload()
    expected = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=1e-5)
    assert not torch.equal(
        ours.model.layers[0].self_attn.q_proj.weight,
        tiny.llama().model.layers[0].self_attn.q_proj.weight,
    )


def test_a_conv1d_is_rotated_too() -> None:
    """PEFT has it on no Conv1D."""
    base = tiny.gpt2()
    model = get_peft_model(copy.deepcopy(base), OFTConfig(oft_block_size=16, init_weights=False))
    model.eval()
    with torch.no_grad():
        for plain, adapted in zip(
            base.transformer.h, model.get_base_model().transformer.h, strict=True
        ):
            (rotation,) = adapted.attn.c_attn.parts["default"].primitives()
            weight = plain.attn.c_attn.weight
            weight.copy_(torch.block_diag(*rotation.blocks) @ weight)
        expected = base(IDS).logits
        torch.testing.assert_close(model(IDS).logits, expected, atol=1e-4, rtol=1e-4)


def test_coft_keeps_to_its_ball_in_training_only() -> None:
    base = BaseModel.from_model(tiny.llama())
    config = OFTConfig(oft_block_size=8, coft=True, eps=0.5, init_weights=False)
    part = OFTPart(base.modules["model.layers.0.self_attn.q_proj"], config)
    part.reset_parameters()
    far = part.weight.detach().clone()
    part.eval()
    (evaluated,) = part.applied()
    assert torch.equal(part.weight, far)
    part.train()
    (trained,) = part.applied()
    torch.testing.assert_close(evaluated.blocks, trained.blocks)
    norms = part.weight.norm(dim=1) * 2**0.5  # of Q: each angle stands in it twice
    assert (norms <= 0.5 / 8**0.5 * 1.0001).all()
    trained.blocks.square().sum().backward()
    assert part.weight.grad is not None
    assert part.weight.grad.abs().max() > 0


def test_files_of_older_releases_are_refused(tmp_path: Path) -> None:
    file = saved(tmp_path)
    base = BaseModel.from_model(tiny.llama())
    old = dict(file.config)
    del old["peft_version"]
    with pytest.raises(UnsupportedError, match=r"peft_version: .*before 0\.18\.0"):
        compile_adapter(config_from_dict(old), file.reader(), base)
    (tmp_path / tiny.CONFIG_NAME).write_text(json.dumps(old))
    with pytest.raises(UnsupportedError, match="peft_version"):
        PeftModel.from_pretrained(tiny.llama(), tmp_path)
    exact = config_from_dict(old | {"use_cayley_neumann": False})
    compile_adapter(exact, file.reader(), base)


def test_our_files_say_whose_series_they_are(tmp_path: Path) -> None:
    model = get_peft_model(tiny.llama(), OFTConfig())
    model.save_pretrained(tmp_path)
    with quiet():
        assert peft.PeftConfig.from_pretrained(tmp_path).peft_version == "0.18.0"
        peft.PeftModel.from_pretrained(tiny.llama(), tmp_path)


def test_module_dropout_warns_that_it_does_nothing(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="module_dropout: has no effect"):
        get_peft_model(tiny.llama(), OFTConfig(module_dropout=0.2))
    saved(tmp_path, module_dropout=0.2)
    PeftModel.from_pretrained(tiny.llama(), tmp_path)  # nor does it matter there


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 4}, "oft_block_size: 32 beside r=4"),
        ({"oft_block_size": 0}, "oft_block_size: 0 beside r=0"),
        ({"oft_block_size": 1}, "oft_block_size: blocks of width 1 on .*q_proj turn nothing"),
        ({"target_modules": ["embed_tokens"]}, "model.embed_tokens is not a linear layer"),
        ({"layers_pattern": "layers"}, "layers_pattern: set, though"),
    ],
)
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        get_peft_model(tiny.llama(), config_from_dict({"peft_type": "OFT", **options}))


def test_a_wrong_shape_or_key_is_named(tmp_path: Path) -> None:
    file = saved(tmp_path)
    base = BaseModel.from_model(tiny.llama())
    narrow = file.changed({KEY: file.tensors[KEY][:, :-1]})
    with pytest.raises(CheckpointError, match=rf"{KEY}: shape \[8, 27\]"):
        compile_adapter(narrow.parsed(), narrow.reader(), base)
    without = file.changed({KEY: None})
    with pytest.raises(CheckpointError, match=f"{KEY}: missing"):
        compile_adapter(without.parsed(), without.reader(), base)
    shared = file.changed(block_share=True)
    with pytest.raises(CheckpointError, match=f"{KEY}: shape"):
        compile_adapter(shared.parsed(), shared.reader(), base)
