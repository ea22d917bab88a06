"""A run's history as a file, router outputs for single tokens, and the plots of both."""

import math
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch

import exfusion_param as exf
from exfusion_param import plotting
from exfusion_param.history import (
    append_row,
    drop_rows_after,
    read_history,
    set_aside,
    write_history,
)
from exfusion_param.routing import record_routing, router_load
from exfusion_param.tensors.functional import route
from exfusion_testing.models import FFNs, inputs, loss_of

CLASSES = ["shirt", "bag", "boot"]


@pytest.fixture
def history(tmp_path: Path) -> dict[str, list[float]]:
    """Three steps of a memory bank; the loss was not measured at the second."""
    model = exf.wrap(FFNs(dim=6))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    path = tmp_path / "metrics.csv"
    for step in range(3):
        x = inputs(6).float()
        with record_routing(model) as shares:
            loss_of(model, x).backward()
        optimizer.step()
        load = router_load(shares, torch.tensor([0, 2, 2, 0]), CLASSES)
        loss = {} if step == 1 else {"loss": step**0.5}
        append_row(path, {"step": step} | loss | exf.metrics(model) | load)
    return read_history(path)


@pytest.fixture(autouse=True)
def _close_figures() -> None:
    plt.close("all")


def test_rows_with_new_columns_keep_the_old_rows(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    rows = [{"step": 1.0}, {"step": 2.0, "loss": 0.1}, {"step": 3.0}, {"loss": 0.3, "lr": 1e-3}]
    for row in rows:
        append_row(path, row)
    appended = path.read_text()
    write_history(path, rows)
    assert path.read_text() == appended
    history = read_history(path)
    assert history["step"][:3] == [1, 2, 3]
    assert history["loss"][1::2] == [0.1, 0.3]
    assert math.isnan(history["lr"][0])
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.csv"]


def test_a_line_that_a_kill_cut_short_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    write_history(path, [{"step": 1, "loss": 0.5}])
    with open(path, "a") as file:
        file.write("2,0.1")
    append_row(path, {"step": 3, "loss": 0.25})
    assert read_history(path) == {"step": [1, 3], "loss": [0.5, 0.25]}


def test_a_resumed_run_keeps_earlier_rows_and_another_run_starts_its_own(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    write_history(path, [{"step": step} for step in range(1, 5)])
    drop_rows_after(path, 2)
    assert read_history(path) == {"step": [1, 2]}
    set_aside(path)
    assert not path.exists()
    append_row(path, {"loss": 1.0})
    set_aside(path)
    assert read_history(tmp_path / "metrics.1.csv") == {"step": [1, 2]}
    assert read_history(tmp_path / "metrics.2.csv") == {"loss": [1]}
    append_row(path, {"loss": 1.0})
    with pytest.raises(ValueError, match="has no column 'step'. Move it"):
        drop_rows_after(path, 2)


def test_a_cell_without_a_number_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,loss\n1,low\n")
    with pytest.raises(ValueError, match="the column 'loss' holds 'low', not a number"):
        read_history(tmp_path / "metrics.csv")


def test_an_empty_file_reads_as_no_history(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").touch()
    assert read_history(tmp_path / "metrics.csv") == {}


def test_fusion_weights_are_drawn_for_each_expert(history: dict[str, list[float]]) -> None:
    assert plotting.group_names(history) == ["blocks.0", "blocks.1"]
    axes = plotting.fusion_weights(history, "blocks.1")
    assert [line.get_label() for line in axes.lines] == [f"expert {i}" for i in range(4)]
    assert list(axes.lines[0].get_ydata()) == history["fusion_weights/blocks.1/0"]
    with pytest.raises(ValueError, match="no FFN group 'blocks.2' with fusion_weights. It has blo"):
        plotting.fusion_weights(history, "blocks.2")


@pytest.mark.parametrize("measure", list(plotting.OVER_GROUPS))
def test_measures_are_drawn_for_each_group(history: dict[str, list[float]], measure: str) -> None:
    axes = plt.figure().subplots()
    assert plotting.over_groups(history, measure, ax=axes) is axes
    assert [line.get_label() for line in axes.lines] == [" blocks.0", " blocks.1"]
    assert list(axes.lines[1].get_ydata()) == history[f"{measure}/blocks.1"]
    assert axes.get_ylabel() == plotting.OVER_GROUPS[measure]


def test_what_is_not_there_is_named_with_what_is(history: dict[str, list[float]]) -> None:
    with pytest.raises(ValueError, match="no 'mass'. It has fusion_weights, entropy, effective_e"):
        plotting.over_groups(history, "mass")
    with pytest.raises(ValueError, match="no column 'epoch'. It has step, loss, "):
        plotting.over_groups(history, "entropy", x="epoch")
    with pytest.raises(ValueError, match="No column of metrics.* but step"):
        plotting.write_plots({"step": [1.0]}, Path())


def test_curves_leave_out_what_was_not_measured(history: dict[str, list[float]]) -> None:
    axes = plt.figure().subplots()
    assert plotting.curves({"run": history}, "loss", ax=axes) is axes
    assert list(axes.lines[0].get_xdata()) == [0, 2]
    with pytest.raises(ValueError, match="'run' has no column 'lr'. It has step, loss, "):
        plotting.curves({"run": history}, "lr")


def test_the_load_of_a_label_is_the_routers_mean_over_its_tokens() -> None:
    model, x = exf.wrap(FFNs(), bank_init="uniform").eval(), inputs().float()
    bank = model.blocks[0].fc1.parametrizations.weight[0].fusion_weights
    with record_routing(model) as shares, torch.no_grad():
        model(x)
        seen = model.stem(x)
    assert shares["blocks.0"].shape == (4, 3, 4)
    by_class = router_load(shares, torch.tensor([0, 2, 2, 0]), CLASSES)
    by_position = router_load(shares, torch.arange(3).expand(4, 3))
    for i in range(4):
        boots = route(seen[1:3], bank.router)[i].item()
        assert by_class[f"router_load/blocks.0/boot/{i}"] == pytest.approx(boots, rel=1e-5)
        second = route(seen[:, 1], bank.router)[i].item()
        assert by_position[f"router_load/blocks.0/1/{i}"] == pytest.approx(second, rel=1e-5)
    assert not any("bag" in name for name in by_class)
    assert not model.blocks[0].fc1._forward_pre_hooks


@pytest.mark.compiled
def test_routing_is_recorded_in_a_compiled_model_and_with_inputs_by_keyword() -> None:
    torch.compiler.reset()
    model, x = exf.wrap(FFNs(), bank_init="uniform").eval(), inputs().float()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(x)
        with record_routing(model) as shares:
            compiled(x)
    assert shares.keys() == {"blocks.0", "blocks.1"}
    with record_routing(model) as shares:
        model.blocks[0].fc1(input=x)
    assert shares.keys() == {"blocks.0"}
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            torch.zeros(3).long(),
            r"shape \(3,\), .* leading dimensions of the router outputs of 'g'",
        ),
        (torch.zeros(8, 16).long(), "does not match the leading dimensions"),
        (torch.full((8,), -1), "Labels must be at least 0 and at most 2, got -1 to -1"),
        (torch.full((8,), 3), "Labels must be at least 0 and at most 2, got 3 to 3"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        router_load({"g": torch.rand(8, 32, 4)}, labels, CLASSES)


def test_routing_of_a_model_without_routers_and_labels_with_slashes_are_refused() -> None:
    with pytest.raises(ValueError, match="FFNs has no memory bank, so no router to record"):
        record_routing(exf.wrap(FFNs(), variant="sw")).__enter__()
    with pytest.raises(ValueError, match="must not hold a slash, got 'top/shirt'"):
        router_load({}, torch.arange(2), ["bag", "top/shirt"])


def test_router_load_is_drawn_as_labels_by_experts(history: dict[str, list[float]]) -> None:
    axes = plotting.router_load(history, "blocks.0")
    (image,) = axes.get_images()
    assert image.get_array().shape == (2, 4)
    assert image.get_array()[1, 3] == history["router_load/blocks.0/boot/3"][-1]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["shirt", "boot"]
    with pytest.raises(ValueError, match="no FFN group 'stem' with router_load"):
        plotting.router_load(history, "stem")


def test_all_that_a_history_holds_is_written(
    history: dict[str, list[float]], tmp_path: Path
) -> None:
    paths = plotting.write_plots(history, tmp_path)
    assert {path.stem for path in paths} == {"fusion_weights", "router_load", *plotting.OVER_GROUPS}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert not plt.get_fignums()


@pytest.mark.parametrize("num_groups", [1, 2, 3])
def test_the_grid_of_fusion_weights_has_one_legend_and_names_its_axes_once(
    num_groups: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plt, "close", lambda: None)
    groups = [f"blocks.{i}" for i in range(num_groups)]
    weights = {f"fusion_weights/{group}/{i}": [0.2, 0.3] for group in groups for i in range(4)}
    plotting.write_plots({"step": [1, 2]} | weights, tmp_path)
    figure = plt.gcf()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [f"expert {i}" for i in range(4)]
    assert (figure.get_supxlabel(), figure.get_supylabel()) == ("step", "fusion weight")
    assert [ax.get_title() for ax in figure.axes] == [f" {group}" for group in groups]
    for ax in figure.axes:
        assert ax.get_legend() is None
        assert (ax.get_xlabel(), ax.get_ylabel()) == ("", "")
    numbered = [ax.xaxis.get_tick_params()["labelbottom"] for ax in figure.axes]
    assert numbered == [False] * (num_groups - 2) + [True] * min(num_groups, 2)
