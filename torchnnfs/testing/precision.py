"""What an arithmetic rounds to: unit roundoff, gamma, unit in the last place, overflow. No torch.

Source: N. J. Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., chapters 2 and 3.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

#: Largest error of `exp`, and of what is made of it (tanh, erf, log), in units roundoff: three
#: units in the last place. Seen on a CPU with AVX-512: 0.57 of these in torch 2.13, 2.37 in NumPy
#: 2.4, whose authors tested up to 2.52; CUDA's manual gives 1 for `expf`, 2 for `tanhf` and `erff`.
EXP = 6.0


@dataclass(frozen=True)
class Precision:
    """What an arithmetic rounds to."""

    #: Unit roundoff u of the arithmetic, half the distance from 1 to the next number, and that of
    #: the float64 reference on top: both sides round.
    unit: float
    tiny: float  # smallest normal number of the arithmetic; below, zero may take its place
    largest: float  # largest finite number of the stored type
    digits: int  # significant bits of the stored type
    smallest: float  # smallest positive (subnormal) number of the stored type
    #: Unit roundoff of the type a result is stored in, when that is another one: half types are
    #: computed in float32 and rounded once.
    stored_unit: float = 0.0
    stored_tiny: float = 0.0  # largest error of that rounding near zero

    @property
    def overflow(self) -> float:
        """Where the arithmetic itself overflows; half types are computed in float32."""
        return PRECISIONS["float32"].largest if self.stored_unit else self.largest

    @property
    def roundoff(self) -> float:
        """Unit roundoff of what is stored: the larger of the two."""
        return max(self.unit, self.stored_unit)

    def gamma(self, n: float) -> float:
        """Relative error of n roundings in a row, ``n u / (1 - n u)``; Higham, lemma 3.1."""
        return n * self.unit / (1 - n * self.unit) if n * self.unit < 1 else np.inf

    def stored(self, y: Array, error: Array) -> Array:
        """`error`, and the rounding of the result `y` to the type it is stored in."""
        if not self.stored_unit:
            return error
        return error + self.stored_unit * (np.abs(y) + error) + self.stored_tiny

    def ulp(self, y: Array) -> Array:
        """Unit in the last place of the stored type at `y`."""
        power = (np.abs(y, dtype=np.float64).view(np.int64) & _EXPONENT).view(np.float64)
        return np.clip(power * 2.0 ** (1 - self.digits), self.smallest, 2.0**1000)

    def round(self, y: Array) -> Array:
        """`y`, in float64, rounded to the nearest number of the stored type, ties to even."""
        with np.errstate(all="ignore"):
            if self.smallest in _STORED:
                return np.asarray(y).astype(_STORED[self.smallest]).astype(np.float64)
            unit = self.ulp(y)
            rounded = np.rint(y / unit) * unit
            return np.where(np.abs(rounded) > self.largest, np.copysign(np.inf, y), rounded)


#: The bits of a number in float64 that hold its exponent.
_EXPONENT = np.int64(0x7FF << 52)
#: What NumPy stores, by the smallest number.
_STORED = {2.0**-1074: np.float64, 2.0**-149: np.float32, 2.0**-24: np.float16}
_U64 = 2.0**-53
_U32 = 2.0**-24 + _U64
#: By the name of the dtype, as torch and NumPy spell it.
PRECISIONS = {
    "float64": Precision(2 * _U64, 2.0**-1022, float(np.finfo(np.float64).max), 53, 2.0**-1074),
    "float32": Precision(_U32, 2.0**-126, float(np.finfo(np.float32).max), 24, 2.0**-149),
    "bfloat16": Precision(_U32, 2.0**-126, 255 * 2.0**120, 8, 2.0**-133, 2.0**-8, 2.0**-126),
    "float16": Precision(_U32, 2.0**-126, 65504.0, 11, 2.0**-24, 2.0**-11, 2.0**-25),
}
