"""FFN discovery over architectures of timm and transformers, and over unknown ones."""

import datetime
import re
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import coverage
import exfusion_param as exf
from exfusion_param.finding.discovery import find_ffns

DOCUMENT = Path(__file__).parents[1] / "docs" / "coverage.md"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the libraries' own code
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_every_ffn_of_todays_sample_is_found_and_nothing_else() -> None:
    today = datetime.datetime.now(tz=datetime.UTC).date()
    sample = coverage.sample_of(today, 12)
    print(f"the sample of {today}: {sample}")
    outcomes = [coverage.outcome(*key) for key in sample]
    assert [each for each in outcomes if not each.is_right and not each.unbuilt] == []


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_the_document_counts_nearly_all_ffns_and_no_wrong_choice(library: str) -> None:
    (row,) = re.findall(rf"^\| {library} \| \d.*$", DOCUMENT.read_text(), re.MULTILINE)
    cells = [cell.strip() for cell in row.split("|")]
    _, _, _, built, _, found, wrong, mixtures = cells[:8]
    assert int(built) > 600
    assert float(found.partition("(")[2].removesuffix("%)")) >= 99.5
    assert int(wrong) == 0
    assert len(set(mixtures.split(" of "))) == 1


NAMED = ["vit_base_patch16_siglip_224", "swinv2_tiny_window8_256", "mvitv2_tiny", "efficientvit_m0"]
NAMED += ["shvit_s1", "repvit_m0_9", "swiftformer_xs", "fasternet_t0", "maxvit_rmlp_nano_rw_256"]
TYPES = ["mask2former", "lxmert", "lilt", "blip_2_qformer", "xlnet", "qwen2_5_vl_vision"]


@pytest.mark.parametrize("name", NAMED + TYPES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_ffns_that_lie_or_are_named_unusually_are_found(name: str) -> None:
    outcome = coverage.outcome("timm" if name in NAMED else "transformers", name)
    assert outcome.unbuilt == ""
    assert outcome.right == outcome.expected > 0
    assert outcome.is_right


@pytest.mark.parametrize("name", ["gcresnet33ts", "resnet18", "seresnet33ts"])
def test_models_without_an_ffn_are_refused(name: str) -> None:
    assert coverage.outcome("timm", name).refused.startswith("No FFN was found in")


def found(model: nn.Module) -> list[list[str]]:
    return [list(group.linears) for group in find_ffns(model)]


class Nested(nn.Module):
    """A gated FFN as many write it: value and gate from one linear, inside of a module."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.ModuleDict({"proj": nn.Linear(8, 64)}), nn.Linear(32, 8))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 32), nn.Linear(8, 32), nn.Linear(32, 8)


class MultiQueryAttention(nn.Module):
    """Wider inside than outside, as an FFN is."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.out = nn.Linear(8, 32), nn.Linear(32, 8)


UNKNOWN = [
    (nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Dropout(), nn.Linear(32, 8)), ["0", "3"]),
    (Nested(), ["net.0.proj", "net.1"]),
    (Gated(), ["a", "b", "c"]),
    (nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 10)), None),  # a classifier
    (nn.Sequential(nn.Linear(8, 2), nn.ReLU(), nn.Linear(2, 8)), None),  # an adapter
    (nn.ModuleList([nn.Linear(8, 32), nn.Linear(32, 8)]), None),  # need not run in turn
    (MultiQueryAttention(), None),
    (nn.MultiheadAttention(8, 2), None),
    (nn.Sequential(nn.Conv2d(8, 32, 1), nn.Conv2d(32, 8, 1)), None),  # convolutions need a name
]


@pytest.mark.parametrize(("ffn", "expected"), UNKNOWN)
def test_structure_tells_ffns_from_what_only_looks_like_one(
    ffn: nn.Module, expected: list[str] | None
) -> None:
    block = nn.ModuleDict({"part": ffn, "other": nn.Linear(8, 8)})
    names = [] if expected is None else [[f"part.{name}" for name in expected]]
    assert found(block) == names


def test_an_ffn_has_the_name_of_the_smallest_module_that_holds_it() -> None:
    ffn = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
    (group,) = find_ffns(nn.Sequential(nn.Sequential(nn.LayerNorm(8), ffn)))
    assert group.name == "0.1"


def test_every_linear_of_a_whole_model_outside_of_its_ffns_is_left_alone() -> None:
    with torch.device("meta"):
        model = transformers.AutoModelForMaskedLM.from_config(transformers.BertConfig())
    chosen = {name for group in find_ffns(model) for name in group.linears}
    expected = {
        f"bert.encoder.layer.{i}.{part}.dense"
        for i in range(12)
        for part in ("intermediate", "output")
    }
    assert chosen == expected


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "switch_transformers"])
def test_mixtures_of_experts_are_refused_by_name(name: str) -> None:
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(name))
    with pytest.raises(ValueError, match="is a mixture of experts already: .* filter_fn"):
        exf.wrap(model)
