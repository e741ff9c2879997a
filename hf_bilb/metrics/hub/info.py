"""What the modules of the library `evaluate` take and say, as far as several take and say the same."""

from __future__ import annotations

import datasets

# One type for both: integers would cut 0.7 down to class 0, and have no NaN. And no format="numpy": that hands over
# float32.
_NUMBER = datasets.Value("float64")
#: What a metric takes of predictions and references that are a number each.
PAIRS = datasets.Features({"predictions": _NUMBER, "references": _NUMBER})
#: What a metric takes of predictions that are a list of numbers each.
LISTS = datasets.Features({"predictions": datasets.Sequence(_NUMBER)})

SCIKIT_LEARN = r"""
@article{scikit-learn,
  title={Scikit-learn: Machine Learning in {P}ython},
  author={Pedregosa, F. and Varoquaux, G. and Gramfort, A. and Michel, V. and Thirion, B. and Grisel, O. and
          Blondel, M. and Prettenhofer, P. and Weiss, R. and Dubourg, V. and Vanderplas, J. and Passos, A. and
          Cournapeau, D. and Brucher, M. and Perrot, M. and Duchesnay, E.},
  journal={Journal of Machine Learning Research},
  volume={12},
  pages={2825--2830},
  year={2011}
}
"""
FAMO = r"""
@article{liu2023famo,
  title={{FAMO}: Fast adaptive multitask optimization},
  author={Liu, Bo and Feng, Yihao and Stone, Peter and Liu, Qiang},
  journal={Advances in Neural Information Processing Systems},
  volume={36},
  year={2023}
}
"""
