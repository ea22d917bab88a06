"""A wrapped checkpoint on disk becomes dense, without its model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file, save_model
from torch import nn

import exfusion_param as exf
from exfusion_param.checkpoint import fuse_checkpoint, save_config
from exfusion_param.checkpoint.dense import fusing
from exfusion_testing.models import FFNs
from exfusion_testing.strategies import configs, hidden_sizes, sizes
from exfusion_testing.wrapped_checkpoints import (
    Save,
    save,
    save_nested,
    save_shards,
    save_torch,
    save_torch_shards,
    trained,
)

VARIANTS = ["sw", "dw", "mb"]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "write",
    [save, save_torch, save_nested, save_shards, save_torch_shards],
    ids=lambda f: f.__name__,
)
def test_it_is_what_fuse_makes_of_the_model(variant: str, write: Save, tmp_path: Path) -> None:
    model = trained(variant)
    fuse_checkpoint(write(model, tmp_path), tmp_path / "dense")
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    expected = exf.fuse(model).state_dict()
    assert dense.keys() == expected.keys()
    assert all(torch.equal(dense[name], value) for name, value in expected.items())
    FFNs().load_state_dict(dense, strict=True)


@pytest.mark.parametrize("shard_bytes", [1, 200])
def test_a_model_in_several_files_loads_by_its_index(shard_bytes: int, tmp_path: Path) -> None:
    model = trained()
    index = fuse_checkpoint(save(model, tmp_path), tmp_path / "dense", shard_bytes=shard_bytes)
    files = sorted(index.parent.glob("*.safetensors"))
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    where = json.loads(index.read_text())["weight_map"]
    assert set(where.values()) == {file.name for file in files}
    expected = exf.fuse(model).state_dict()
    assert where.keys() == expected.keys()
    for file in files:
        dense = load_file(file)
        assert len(dense) == 1 or sum(tensor.nbytes for tensor in dense.values()) <= shard_bytes
        assert all(torch.equal(expected[name], tensor) for name, tensor in dense.items())


def test_one_file_that_would_be_too_large_is_refused(tmp_path: Path) -> None:
    folder = save(trained(), tmp_path)
    with pytest.raises(ValueError, match=r"larger than shard_bytes=200.* Name a folder, for \d+ "):
        fuse_checkpoint(folder, tmp_path / "dense.safetensors", shard_bytes=200)
    assert not list(tmp_path.glob("dense*"))


@given(
    config=configs(),
    dim=sizes,
    hidden=hidden_sizes,
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_any_shape_and_dtype_in_parts_of_any_size(
    config: exf.ExFusionConfig, dim: int, hidden: int, bias: bool, dtype: torch.dtype,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    folder = tmp_path_factory.mktemp("run")
    model = exf.wrap(FFNs(dim, hidden, bias=bias).to(dtype), config.replace(bank_init="uniform"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fusing, "PART_BYTES", 64)
        path = fuse_checkpoint(save(model, folder), folder / "dense.safetensors")
    dense, expected = load_file(path), exf.fuse(model).state_dict()
    assert dense.keys() == expected.keys()
    for name, value in expected.items():
        eps = torch.finfo(dtype).eps  # sums of a part may be taken in another order
        torch.testing.assert_close(dense[name], value, rtol=4 * eps, atol=eps)


def test_parts_wrapped_apart_with_other_settings(tmp_path: Path) -> None:
    model = nn.ModuleDict({"encoder": FFNs(), "decoder": FFNs()})
    exf.wrap(model["encoder"], num_experts=2, variant="dw")
    exf.wrap(model["decoder"], num_experts=3, bank_init="uniform", shared_router=False)
    dense = load_file(fuse_checkpoint(save(model, tmp_path), tmp_path / "dense.safetensors"))
    expected = exf.fuse(model).state_dict()
    assert dense.keys() == expected.keys()
    assert all(torch.equal(dense[name], value) for name, value in expected.items())


def test_siblings_wrapped_apart_keep_their_own_fusion_weights(tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    for globs in (["0", "1"], ["2", "3"]):
        exf.wrap(model, filter_fn=globs, variant="dw")
    for i in (0, 2):
        weights = model[i].parametrizations.weight[0].fusion_weights.weights
        nn.init.uniform_(weights)
    assert {name.split("/")[1] for name in exf.metrics(model)} == {"0", "2"}
    dense = load_file(fuse_checkpoint(save(model, tmp_path), tmp_path / "dense.safetensors"))
    for name, value in exf.fuse(model).state_dict().items():
        assert torch.equal(dense[name], value), name


@pytest.mark.compiled
@pytest.mark.parametrize("described", ["model", "compiled"])
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod."])
def test_names_from_compile_and_ddp_are_those_of_the_model(
    described: str, prefix: str, tmp_path: Path
) -> None:
    model = trained()
    save_config(torch.compile(model) if described == "compiled" else model, tmp_path)
    state = {prefix + name: value for name, value in model.state_dict().items()}
    torch.save({"model_state_dict": state}, tmp_path / "model.pt")
    dense = load_file(fuse_checkpoint(tmp_path, tmp_path / "dense.safetensors"))
    assert dense.keys() == FFNs().state_dict().keys()


def test_a_child_called_module_keeps_its_name(tmp_path: Path) -> None:
    model = nn.ModuleDict({"module": trained()})
    dense = load_file(fuse_checkpoint(save(model, tmp_path), tmp_path / "dense.safetensors"))
    assert dense.keys() == exf.fuse(model).state_dict().keys()


def test_a_file_with_its_own_description_ignores_anothers_config(tmp_path: Path) -> None:
    save_config(trained("mb"), tmp_path)
    fuse_checkpoint(save_nested(trained("dw"), tmp_path), tmp_path / "dense")


def test_one_file_comes_before_shards_left_from_an_older_one(tmp_path: Path) -> None:
    save_shards(trained("mb"), tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    fuse_checkpoint(save(trained("mb"), tmp_path), tmp_path / "dense")


def test_shared_memory_may_be_in_the_file_once_and_extra_state_is_no_tensor(
    tmp_path: Path,
) -> None:
    class Extra(FFNs):
        def get_extra_state(self) -> dict[str, int]:
            return {"version": 1}

        def set_extra_state(self, state: dict[str, int]) -> None:
            pass

    model = Extra()
    model.register_buffer("a", torch.ones(3))
    model.register_buffer("b", model.a)
    exf.wrap(model, bank_init="uniform")
    save_config(model, tmp_path)
    save_model(nn.ModuleDict(model.named_children()), tmp_path / "children.safetensors")
    tensors = load_file(tmp_path / "children.safetensors") | {"a": model.a}
    save_file(tensors, tmp_path / "model.safetensors")
    dense = load_file(fuse_checkpoint(tmp_path, tmp_path / "dense"))
    assert "a" in dense
    assert "b" not in dense


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_of_transformers_loads_from_the_fused_folder(variant: str, tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=20, n_embd=8, n_layer=2, n_head=2)
    model = transformers.GPT2LMHeadModel(config)  # its head is tied to its embedding
    exf.wrap(model, variant=variant, bank_init="uniform")
    model.save_pretrained(tmp_path / "wrapped", max_shard_size="2KB")
    assert len(list((tmp_path / "wrapped").glob("*.safetensors"))) > 1
    save_config(model, tmp_path / "wrapped")
    fuse_checkpoint(tmp_path / "wrapped", tmp_path / "dense")
    exf.fuse(model).save_pretrained(tmp_path / "expected")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "dense" / name).exists()
    assert json.loads((tmp_path / "dense" / "config.json").read_text()) == json.loads(
        (tmp_path / "expected" / "config.json").read_text()
    )
    loaded, info = transformers.GPT2LMHeadModel.from_pretrained(
        tmp_path / "dense", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_the_rest_of_a_config_stays(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architecture": "vit"}')
    fuse_checkpoint(save(trained(), tmp_path), tmp_path / "dense")
    assert json.loads((tmp_path / "dense" / "config.json").read_text()) == {"architecture": "vit"}


def peak_memory(*command: object) -> int:
    """Bytes that a command had in memory at most."""
    code = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    arguments = [sys.executable, "-c", code, *map(str, command)]
    result = subprocess.run(arguments, capture_output=True, text=True, check=True)
    return 1024 * int(result.stdout.split()[-1])


class WithEmbedding(FFNs):
    """Its largest dense tensor is not fused."""

    def __init__(self, dim: int, depth: int, rows: int) -> None:
        super().__init__(dim, 4 * dim, depth)
        self.embedding = nn.Embedding(rows, dim)


@pytest.mark.processes
@pytest.mark.parametrize("write", [save, save_torch], ids=["safetensors", "torch"])
def test_it_holds_one_file_of_the_dense_model_in_memory(write: Save, tmp_path: Path) -> None:
    command, shard = Path(sys.executable).parent / "exfusion", 2**27
    peaks = {}
    for name, *shape in (("small", 8, 1, 2), ("large", 1024, 4, 2**15)):
        folder = tmp_path / name
        folder.mkdir()
        write(exf.wrap(WithEmbedding(*shape), bank_init="uniform", num_experts=8), folder)
        out = tmp_path / f"{name}-dense"
        peaks[name] = peak_memory(command, "fuse", folder, out, "--shard-bytes", shard)
    assert len(list((tmp_path / "large-dense").glob("*.safetensors"))) > 2
    stack, allowed = 8 * 4 * 1024**2 * 4, 2**26  # what safetensors copies and malloc keeps
    assert allowed < min(shard, stack)  # neither a second file nor a whole stack is in memory
    assert peaks["large"] - peaks["small"] < shard + allowed
