"""GGUF files in other weight formats.

>>> import smallm.quantize
>>> smallm.quantize.quantize("smollm2-f16.gguf", "smollm2-q4.gguf", "q4_k_m")

save_importance() measures on a text where errors matter, which quantize(imatrix=) then heeds.

The numbers are the C library's work, with all threads and the same bytes on every machine; this
package walks the file, a piece of a tensor at a time, and decides which tensor gets which format.
"""

from ._imatrix import read_importance
from ._measure import Importance, save_importance
from ._mix import TYPES
from ._quantize import Quantized, quantize

__all__ = ["TYPES", "Importance", "Quantized", "quantize", "read_importance", "save_importance"]
