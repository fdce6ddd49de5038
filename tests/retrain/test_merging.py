"""Averages of parameters: identities, files as well as memory, and what cannot be averaged."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from assay.retrain import ablate, average, merge_files


def network(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_mean_of_equal_models_is_the_model_to_the_bit(dtype) -> None:
    state = network(dtype=dtype).state_dict()
    for copies in (1, 2, 3, 7, 10):
        for weights in (None, [0.5] * copies, [0.1 * (k + 1) for k in range(copies)]):
            found = average([state] * copies, weights)
            assert list(found) == list(state)
            assert all(
                torch.equal(found[name], state[name]) and found[name].dtype == t.dtype for name, t in state.items()
            )


def test_with_equal_gram_matrices_the_mean_of_regressions_is_the_joint_fit() -> None:
    rng = np.random.default_rng(0)
    base = np.linalg.qr(rng.normal(size=(20, 4)))[0]
    parts = [(np.linalg.qr(rng.normal(size=(20, 20)))[0] @ base, rng.normal(size=20)) for _ in range(3)]

    def fit(x, y):
        return {"w": torch.tensor(np.linalg.lstsq(x, y, rcond=None)[0])}

    for mix in itertools.chain(itertools.combinations(range(3), 2), [range(3)]):
        joint = fit(np.concatenate([parts[k][0] for k in mix]), np.concatenate([parts[k][1] for k in mix]))
        torch.testing.assert_close(average([fit(*parts[k]) for k in mix])["w"], joint["w"], rtol=0, atol=1e-12)
    other = (3 * rng.normal(size=(20, 4)), rng.normal(size=20))  # without them it is not
    joint = fit(np.concatenate([parts[0][0], other[0]]), np.concatenate([parts[0][1], other[1]]))
    assert float((average([fit(*parts[0]), fit(*other)])["w"] - joint["w"]).abs().max()) > 0.01


def test_weights_are_scaled_and_zero_leaves_a_model_out() -> None:
    a, b = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([5.0, torch.inf])}
    assert average([a, b], [3, 1])["w"].tolist() == [2.0, torch.inf]
    assert average([a, b], [2, 0])["w"].tolist() == [1.0, 2.0]
    c = {"w": torch.tensor([3.0, -torch.inf])}
    for weight in (1e308, 5e-324):
        assert average([a, c], [weight, weight])["w"].tolist() == [2.0, -torch.inf]


def test_losses_are_taken_in_eval_mode_whatever_the_last_one_left() -> None:
    def loss(model: nn.Module) -> float:
        modes.append(any(module.training for module in model.modules()))
        model.train()
        return 0.0

    modes: list[bool] = []
    ablate(network(), [network(seed) for seed in range(3)], loss, [(0, 1)])
    assert modes == [False] * 4


def save_folder(path: Path, model: nn.Module, files: int = 2, **config: object) -> Path:
    """As transformers saves a model that it cuts up."""
    path.mkdir()
    state = model.state_dict()
    names = [f"model-{k + 1:05d}-of-{files:05d}.safetensors" for k in range(files)]
    weight_map = {name: names[k % files] for k, name in enumerate(state)}
    for file in names:
        save_file({name: t for name, t in state.items() if weight_map[name] == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (path / "config.json").write_text(json.dumps({"model_type": "small", "_name_or_path": str(path), **config}))
    (path / "tokenizer.json").write_text("{}")
    return path


def test_files_are_averaged_as_memory_is(tmp_path: Path) -> None:
    models = [network(seed) for seed in range(3)]
    folders = [save_folder(tmp_path / f"m{k}", model, files=1 + k) for k, model in enumerate(models)]
    expected = average(models)
    assert all(torch.equal(expected[name], t) for name, t in average(folders).items())
    save_file(models[2].state_dict(), tmp_path / "one.safetensors")
    mixed = average([models[0], folders[1], tmp_path / "one.safetensors"])
    assert all(torch.equal(expected[name], t) for name, t in mixed.items())
    out = merge_files(folders[::-1], tmp_path / "out")
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in folders[2].iterdir())
    found = {name: t for file in out.glob("*.safetensors") for name, t in load_file(file).items()}
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert average([out]).keys() == expected.keys()
    with pytest.raises(ValueError, match="is there already"):
        merge_files(folders, out)


def test_a_merge_that_fails_leaves_nothing(tmp_path: Path) -> None:
    folders = [save_folder(tmp_path / "a", network(0)), save_folder(tmp_path / "b", network(1).double())]
    with pytest.raises(
        ValueError, match=r"b: tensor '0\.weight': expected torch\.float32 \(3, 4\).* found torch\.float64"
    ):
        merge_files(folders, tmp_path / "out")
    other = save_folder(tmp_path / "c", network(1), rope_theta=1.0)
    with pytest.raises(ValueError, match=r"c/config\.json: differs from .*a/config\.json in rope_theta"):
        merge_files([folders[0], other], tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c"]


def test_what_a_folder_says_of_its_files_is_checked(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "a", network())
    save_file({"w": torch.zeros(1)}, tmp_path / "outside.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "../outside.safetensors"}}))
    with pytest.raises(ValueError, match="which are no files of that folder"):
        average([folder])
    index.write_text("[")
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        average([folder])
    (tmp_path / "x.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        average([tmp_path / "x.safetensors"])
    with pytest.raises(ValueError, match=r"expected a \.safetensors file, or a folder"):
        average([tmp_path / "nothing"])


def test_ablations_are_losses_of_averages() -> None:
    """Of one parameter, with a loss that tells every mean apart."""
    model = nn.Linear(1, 1, bias=False)
    parts = [{"weight": torch.tensor([[float(v)]])} for v in (0, 1, 4, 10)]
    before = model.weight.clone()
    asked = []

    def loss(m):
        assert not m.training
        asked.append(m.weight.item())
        return m.weight.item() ** 2

    found = ablate(model, parts, loss, [(0, 2), (3,), (2, 0), (1, 2, 3)])
    assert found.mixes == ((0, 2), (3,), (2, 0), (1, 2, 3))
    assert found.losses.tolist() == [4.0, 100.0, 4.0, 25.0]
    assert found.everything == 3.75**2
    np.testing.assert_allclose(found.scores, np.square([5, 14 / 3, 11 / 3, 5 / 3]) - 3.75**2, rtol=1e-6)
    assert len(asked) == len(set(asked)) == 7  # (1, 2, 3) is all but the first: no mean is taken twice
    assert torch.equal(model.weight, before)
    weighted = ablate(model, parts, loss, [(0, 2)], weights=[3, 1, 1, 1])
    assert weighted.losses.tolist() == [1.0]


def test_tied_tensors_may_be_in_a_file_once(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    paths = [tmp_path / f"{k}.safetensors" for k in range(2)]
    for k, path in enumerate(paths):
        save_file({"0.weight": torch.full((2, 2), float(k))}, path)
    assert ablate(model, paths, lambda m: m[1].weight.sum().item(), [(0, 1)]).losses.tolist() == [2.0]
    model[1] = nn.Linear(2, 2, bias=False)
    with pytest.raises(ValueError, match=r"parts: lack the model's tensors \['1\.weight'\]"):
        ablate(model, paths, lambda m: 0.0, [(0, 1)])


def test_a_model_that_ties_what_its_parts_do_not_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    tied = [{"0.weight": torch.full((2, 2), k), "1.weight": torch.full((2, 2), k)} for k in (0.0, 1.0)]
    assert ablate(model, tied, lambda m: m[0].weight.sum().item(), [(0, 1)]).losses.tolist() == [2.0]
    untied = [{**part, "1.weight": torch.full((2, 2), 5.0)} for part in tied]
    with pytest.raises(ValueError, match=r"ties '1\.weight' to '0\.weight', which differ in the parts"):
        ablate(model, untied, lambda m: 0.0, [(0, 1)])


def test_what_is_quantised_has_no_mean(tmp_path: Path) -> None:
    for k in range(2):
        (tmp_path / f"{k}").mkdir()
        state = {"w": torch.full((2,), 1.0 + k).to(torch.float8_e4m3fn), "w_scale": torch.tensor(2.0 - k)}
        save_file(state, tmp_path / f"{k}/model.safetensors")
    with pytest.raises(ValueError, match=r"tensor 'w' of torch\.float8_e4m3fn is quantised"):
        merge_files([tmp_path / "0", tmp_path / "1"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_links_parts_of_configurations_and_what_lies_beside(tmp_path: Path) -> None:
    """As in the cache of a hub: a snapshot's files are links."""
    blobs = [save_folder(tmp_path / f"b{k}", network(k), text_config={"_name_or_path": str(k), "n": 1}) for k in (0, 1)]
    for name in ("modeling_small.py", "source.spm"):
        (blobs[0] / name).write_text("beside")
    folders = []
    for blob in blobs:
        folders.append(tmp_path / f"snapshot-{blob.name}")
        folders[-1].mkdir()
        for file in blob.iterdir():
            (folders[-1] / file.name).symlink_to(file)
    before = {file: file.read_bytes() for blob in blobs for file in blob.iterdir()}
    out = merge_files(folders, tmp_path / "out")
    assert {file.name for file in out.iterdir()} == {file.name for file in blobs[0].iterdir()}
    assert not any(file.is_symlink() for file in out.iterdir())
    assert {file: file.read_bytes() for blob in blobs for file in blob.iterdir()} == before
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    with pytest.raises(ValueError, match="is there already"):
        merge_files(folders, tmp_path / "dangling")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda s, n: average([]), "expected one model at least"),
        (lambda s, n: average([s, {"w": torch.zeros(1)}]), "has other tensors than"),
        (lambda s, n: average([s, s], [1]), "weights: expected 2 numbers"),
        (lambda s, n: average([s, s], [1, -1]), "weights: expected 2 numbers of at least 0"),
        (lambda s, n: average([s, s], [0, 0]), "not all 0"),
        (
            lambda s, n: average([s, {**s, "1.num_batches_tracked": torch.tensor(5)}]),
            "'1.num_batches_tracked' of torch.int64",
        ),
        (lambda s, n: ablate(n, [s], lambda m: 0.0, [(0,)]), "parts: expected two models at least"),
        (lambda s, n: ablate(n, [s, s], lambda m: 0.0, [(0, 2)]), r"mixes\[0\]: row 2 lies outside 0\.\.1"),
        (lambda s, n: ablate(n, [s, s], lambda m: 0.0, [0, 1]), r"mixes\[0\]: expected row numbers"),
        (lambda s, n: ablate(n, [s, s], lambda m: 0.0, [()]), r"mixes\[0\]: expected row numbers"),
        (lambda s, n: ablate(n, [s, s], lambda m: torch.nan, [(0,)]), r"loss: of parts \[0\] expected a finite number"),
        (lambda s, n: ablate(n, [s, s], lambda m: 0.0, [(0,)], weights=[1, 0]), "weights: expected 2 numbers above 0"),
        (lambda s, n: ablate(nn.Linear(4, 3), [s, s], lambda m: 0.0, [(0,)]), "model: expected tensor '0.weight'"),
    ],
)
def test_what_is_refused(call, words) -> None:
    model = network()
    with pytest.raises(ValueError, match=words):
        call(model.state_dict(), model)


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(TypeError, match="expected models, states or paths, got int"):
        average([3])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="expected tensors by name"):
        average([{"w": 1.0}])  # type: ignore[dict-item]
