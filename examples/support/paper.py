"""The paper's own figures (ExFusion, arXiv 2603.27965), as it prints them.

N = 4, momentum 0.95 and 8 A100 GPUs, unless a row says otherwise. `mb` is the memory-bank variant.
"""

from typing import NamedTuple


class Table(NamedTuple):
    """A table of the paper.

    Args:
        title: what it is about.
        columns: the heads of the values.
        rows: by the name of a row its values, as printed.
    """

    title: str
    columns: tuple[str, ...]
    rows: dict[str, tuple[str, ...]]

    def column(self, name: str) -> dict[str, str]:
        """One value of each row."""
        place = self.columns.index(name)
        return {row: values[place] for row, values in self.rows.items()}

    def number(self, row: str, column: str) -> float:
        """A value without its thousands' separators and units."""
        return float(self.column(column)[row].replace(",", "").split()[0])


ACCURACY, DENSE, MB = "top-1", "dense", "mb"

TABLES = {
    "I": Table(
        "ViT-B/16, ImageNet-1k",
        (ACCURACY, "parameters", "storage", "memory", "GPU hours"),
        {
            "dense": ("77.9", "86.6 M", "330 MB", "19,201 MB", "240"),
            "MoE-8-1": ("71.5", "485.6 M", "1.8 GB", "29,475 MB", "664"),
            "MoE-16-1": ("75.3", "939.0 M", "3.5 GB", "30,619 MB", "672"),
            "MoE-32-1": ("75.6", "1,845.8 M", "6.9 GB", "32,866 MB", "696"),
            "MoE-64-1": ("75.8", "3,659.3 M", "13.7 GB", "37,380 MB", "720"),
            "mb": ("81.1", "86.6 M", "330 MB", "25,327 MB", "264"),
        },
    ),
    "II": Table(
        "ImageNet-1k",
        ("parameters", "FLOPs", DENSE, MB),
        {
            "ViT-S": ("22.1 M", "4.6 G", "71.8", "80.4"),
            "ViT-B": ("86.6 M", "17.6 G", "77.9", "81.1"),
            "DeiT-T": ("5.7 M", "1.2 G", "72.2", "74.1"),
            "DeiT-S": ("22.1 M", "4.6 G", "79.8", "80.6"),
            "PVT-T": ("13.2 M", "1.9 G", "75.1", "75.4"),
            "PVT-S": ("24.5 M", "3.8 G", "79.8", "80.7"),
            "PVT-M": ("44.2 M", "6.7 G", "81.2", "82.1"),
            "PVT-L": ("61.4 M", "9.8 G", "81.7", "82.5"),
            "Swin-T": ("29 M", "4.5 G", "81.3", "81.5"),
            "Swin-S": ("50 M", "8.7 G", "83.0", "83.2"),
            "Swin-B": ("88 M", "15.4 G", "83.5", "83.7"),
        },
    ),
    "III": Table(
        "ADE20K, mIoU",
        ("parameters", DENSE, MB),
        {
            "Semantic FPN, PVT-T, 40 K iterations": ("17 M", "35.7", "37.2"),
            "Semantic FPN, PVT-S, 40 K iterations": ("28 M", "39.8", "42.0"),
            "Semantic FPN, PVT-M, 40 K iterations": ("48 M", "41.6", "43.6"),
            "Semantic FPN, PVT-L, 40 K iterations": ("65 M", "42.1", "44.4"),
            "UperNet, DeiT-T, 80 K iterations": ("34 M", "38.0", "40.4"),
            "UperNet, DeiT-T, 160 K iterations": ("34 M", "38.7", "40.7"),
            "UperNet, DeiT-S, 80 K iterations": ("52 M", "43.0", "43.5"),
            "UperNet, DeiT-S, 160 K iterations": ("52 M", "43.8", "44.8"),
        },
    ),
    "IV": Table(
        "COCO 2017, AP / AP50 / AP75",
        ("parameters", DENSE, MB),
        {
            "Mask R-CNN, PVT-M": ("63.9 M", "42.0 / 64.4 / 45.6", "42.6 / 65.1 / 46.4"),
            "Mask R-CNN, PVT-L": ("81.0 M", "42.9 / 65.0 / 46.6", "43.0 / 65.2 / 46.8"),
            "RetinaNet, PVT-M": ("53.9 M", "41.9 / 63.1 / 44.3", "42.6 / 63.7 / 45.5"),
            "RetinaNet, PVT-L": ("71.1 M", "42.6 / 63.7 / 45.4", "42.9 / 64.2 / 45.6"),
        },
    ),
    "V": Table(
        "GLUE after C4, T5-base",
        ("SST-2", "MRPC", "QQP", "MNLI", "QNLI", "mean"),
        {
            "dense": ("91.3", "86.8", "90.7", "83.5", "90.2", "88.5"),
            "MoE-4-1": ("93.1", "89.2", "90.4", "84.0", "91.3", "89.6"),
            "mb": ("93.7", "90.6", "91.0", "86.3", "91.9", "90.7"),
        },
    ),
    "VI": Table(
        "variants, DeiT-T",
        (ACCURACY,),
        {"dense": ("72.20",), "sw": ("73.71",), "dw": ("73.96",), "mb": ("74.10",)},
    ),
    "VII": Table(
        "experts, DeiT-T",
        (ACCURACY,),
        {"N = 4": ("74.10",), "N = 8": ("73.56",), "N = 16": ("73.28",)},
    ),
    "VIII": Table(
        "momentum, DeiT-T",
        (ACCURACY,),
        {"0.90": ("73.72",), "0.92": ("74.06",), "0.95": ("74.10",), "0.98": ("74.08",)},
    ),
    "IX": Table(
        "router, DeiT-T",
        (ACCURACY, "router parameters"),
        {"shared": ("74.10", "9.2 K"), "one per linear": ("73.95", "46.1 K")},
    ),
    "X": Table(
        "layers, DeiT-T",
        (ACCURACY,),
        {
            "second half": ("72.98",),  # 6 to 11
            "every second, from the first": ("74.07",),  # 0, 2, 4, 6, 8, 10
            "every second": ("73.29",),  # 1, 3, 5, 7, 9, 11
            "all": ("74.10",),
        },
    ),
    "XI": Table(
        "time of training, DeiT-T",
        ("dense = 1",),
        {"dense": ("1",), "N = 4": ("1.02",), "N = 8": ("1.08",), "N = 128": ("1.11",)},
    ),
}
"""By their numbers. Table XI's text says 8 % for four experts and 10 % for ViT-B."""
