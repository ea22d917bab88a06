"""Does it help on my task? Variants beside dense training and the matched control.

    from exfusion_param import study

    study.run(build, train, out="runs/study", rates=(1e-3, 3e-3), at_once=2)

What a variant gains is its difference from the *control*, dense training from the mean of the same
draws, seed by seed: plain dense training differs from `sw` by its start as well. Each arm chooses
its learning rate by as many runs as any other, with seeds of their own.

`runs` does one run and records it, `processes` does several at once, `rates` chooses learning
rates, `statistics` says what a few seeds can tell, `comparison` puts any arms side by side,
`figure` draws them, `models` makes those of a user's model, and `user_code` finds it for the
command line.
"""

from .comparison import Comparison, compare
from .models import run
from .runs import Run
from .statistics import Spread

__all__ = ["Comparison", "Run", "Spread", "compare", "run"]
