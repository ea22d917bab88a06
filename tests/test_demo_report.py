"""The demo's report: accuracies, and its page."""

from collections.abc import Sequence
from html.parser import HTMLParser
from math import sqrt

import pytest
import torch
from torch import Tensor

import exfusion_param as exf
from exfusion_param.history import write_history
from exfusion_testing.models import FFNs, inputs, loss_of
from support import report
from support.accuracies import Difference, accuracy, standard_error


def rights(*runs: tuple[int, bool]) -> Tensor:
    """Whether images are right, from how many in a row are."""
    return torch.cat([torch.full((count,), is_right) for count, is_right in runs])


# Of ten images, ours has 8 and theirs 6: three are won, one is lost, and six are equal.
OURS = rights((8, True), (2, False))
THEIRS = rights((5, True), (3, False), (1, True), (1, False))


def test_the_standard_error_of_an_accuracy_is_that_of_a_share() -> None:
    assert accuracy(OURS) == pytest.approx(80)
    assert standard_error(OURS) == pytest.approx(100 * sqrt(0.8 * 0.2 / 10))
    assert standard_error(torch.ones(10)) == 0


def test_the_standard_error_of_a_difference_is_taken_image_by_image() -> None:
    difference = Difference.of(OURS, THEIRS)
    assert difference.points == pytest.approx(20)
    # The gains are 1 three times and -1 once: their mean is 0.2, that of their squares 0.4.
    assert difference.error == pytest.approx(100 * sqrt((0.4 - 0.2**2) / 10))
    assert str(difference) == (
        "+20.00 points, with a standard error of 18.97 points: not larger than twice its "
        "standard error"
    )


@pytest.mark.parametrize(("lost", "is_clear"), [(1, False), (3, False), (4, True), (100, True)])
def test_a_difference_is_clear_from_twice_its_standard_error_on(lost: int, is_clear: bool) -> None:
    # With a share q lost and none won, the ratio is q / sqrt(q (1 - q) / 1000): 2 at q = 4 / 1004.
    theirs = torch.ones(1000)
    ours = rights((lost, False), (1000 - lost, True))
    difference = Difference.of(ours, theirs)
    assert difference.is_clear == is_clear
    assert (": larger than twice" in str(difference)) == is_clear
    assert str(difference).startswith(f"-{lost / 10:.2f} points")


def test_equal_runs_do_not_differ() -> None:
    assert Difference.of(OURS, OURS) == (0, 0)
    assert not Difference.of(OURS, OURS).is_clear


class Page(HTMLParser):
    """The headings, rows of tables, attributes of elements and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.headings: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])

    def handle_data(self, data: str) -> None:
        self.text += data
        tag = self.elements[-1][0] if self.elements else ""
        if tag in ("td", "th") and data.strip():
            self.rows[-1].append(data)
        if tag in ("h1", "h2") and data.strip():
            self.headings.append(data)

    def attributes(self, tag: str) -> Sequence[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    folder = tmp_path_factory.mktemp("run")
    model, runs = exf.wrap(FFNs()), {"dense": THEIRS, "exfusion": OURS}
    loss_of(model, inputs().float()).backward()
    measured = {f"{key}/{run}": 1.0 for key in ("loss", "accuracy") for run in runs}
    write_history(
        folder / "metrics.csv", [{"step": s} | measured | exf.metrics(model) for s in (1, 2)]
    )
    results = [
        report.Result(run, is_right, 10.0 + i, 2000, 1000)
        for i, (run, is_right) in enumerate(runs.items())
    ]
    settings = {"exfusion": {"momentum": 0.95, "layers": None}, "data": "<b>&", "smoke": True}
    path = report.write_report(folder, results, "logits agree", settings)
    return Page(path.read_text(encoding="utf-8"))


def test_the_report_states_the_results_and_what_they_mean(page: Page) -> None:
    sections = ["Results", "What these figures mean", "Plots", "Settings", "Environment"]
    assert page.headings[1:] == sections
    for row in (
        ["dense", "exfusion"],
        ["test accuracy, %", "60.00", "80.00"],
        ["its standard error", "15.49", "12.65"],
        ["step time, dense = 1", "1.00", "1.10"],
        ["parameters in training", "2,000", "2,000"],
    ):
        assert row in page.rows
    assert f"exfusion minus dense: {Difference.of(OURS, THEIRS)}." in page.text


def test_the_report_lists_settings_as_the_command_line_names_them(page: Page) -> None:
    rows = [["momentum", "0.95"], ["layers", "not set"], ["data", "<b>&"], ["smoke", "yes"]]
    assert all(row in page.rows for row in rows)
    assert ["torch", torch.__version__] in page.rows
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in (
        page.attributes("meta")
    )


def test_every_plot_of_the_report_has_a_caption_and_a_text_instead(page: Page) -> None:
    images = page.attributes("img")
    assert len(images) == len(report.PLOTS) == len(page.attributes("figcaption"))
    assert all(image["alt"] for image in images)
    assert all(caption in page.text for caption, _ in report.PLOTS.values())
