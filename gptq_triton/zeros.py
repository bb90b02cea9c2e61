"""How writers store zero points, and what the stored words alone prove.

Three forms exist. ``v2`` stores z. ``v1`` stores z - 1 in each field, wrapped inside it. ``v1-words`` is v2
with one constant subtracted from every whole word, so that a zero point of 0 borrows from its neighbour: only
adding the constant to the whole word recovers it.

Source: GPTQModel's ``convert_gptq_v2_to_v1_format_module``. Its constants for 3 bits are no row of ones (they
count fields from the wrong end), but what was subtracted can be added. AutoGPTQ's ``QuantLinear.pack`` wraps a
zero point of 0 to 0xFFFFFFFF before it shifts and ORs it, which overwrites every higher field of the word.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .packing import pack_zeros, unpack_zeros

V1, V2, V1_WORDS = "v1", "v2", "v1-words"
FORMS = (V1, V2, V1_WORDS)
FORM_OF_LABEL = {"gptq": V1, "gptq_v2": V2}
LABEL_OF_FORM = {V1: "gptq", V2: "gptq_v2"}
WORD_OFFSETS = {
    2: (0x55555555,),
    3: (0x24924924, 0x92492492, 0x49249249),
    4: (0x11111111,),
    8: (0x01010101,),
}


def recover_words(qzeros: Tensor, bits: int) -> Tensor:
    """``v1-words`` zero points as v2 stores them: one addition per word, modulo 2**32.

    Args:
        qzeros: int32 (G, words).
        bits: 2, 3, 4 or 8.

    Returns:
        int32 (G, words), a new tensor.
    """
    return qzeros + _offsets(qzeros, bits)


def convert_zeros(qzeros: Tensor, bits: int, N: int, old: str, new: str) -> Tensor:
    """Stored zero points from one form to another; the same tensor if nothing changes.

    Args:
        qzeros: int32 (G, ceil(N * bits / 32)).
        bits: 2, 3, 4 or 8.
        N: Out-features.
        old: One of :data:`FORMS`.
        new: "v1" or "v2".

    Raises:
        ValueError: ``new`` is no form that is written.
    """
    if new not in LABEL_OF_FORM:
        raise ValueError(f"zero points are written as one of {tuple(LABEL_OF_FORM)}, got {new!r}")
    if old == V1_WORDS:
        qzeros, old = recover_words(qzeros, bits), V2
    if old == new:
        return qzeros
    return pack_zeros(unpack_zeros(qzeros, bits, N, LABEL_OF_FORM[old]), bits, LABEL_OF_FORM[new])


def decode_zeros(qzeros: Tensor, bits: int, N: int, form: str) -> Tensor:
    """Stored zero points in any form to uint8 (G, N)."""
    return unpack_zeros(convert_zeros(qzeros, bits, N, form, V2), bits, N, "gptq_v2")


def symmetric_form(qzeros: Tensor, bits: int, N: int) -> str | None:
    """The form in which all of these zero points are ``2**(bits - 1)``, or None: what symmetric weights prove.

    With 2, 4 and 8 bits nothing borrows at that value, so that v1 and v1-words are the same words.
    """
    middle = 2 ** (bits - 1)
    for form in FORMS if qzeros.numel() else ():
        if bool((decode_zeros(qzeros, bits, N, form) == middle).all()):
            return form
    return None


def wrapped_fields(qzeros: Tensor, bits: int, N: int) -> int:
    """How many v1 fields hold 2**bits - 1, a zero point of 0: there, and only there, v1 writers disagree."""
    return int((unpack_zeros(qzeros, bits, N, "gptq_v2") == 2**bits - 1).sum())


def overwritten_fields(qzeros: Tensor, bits: int, N: int) -> int:
    """How many fields a writer destroyed by a zero point of 0 below them; 0 unless every wrapped field fits that.

    Such a word is all ones from the zero point of 0 to its top. One field that is wrapped and has another
    value above it shows that this writer did not do that.
    """
    ones = unpack_zeros(qzeros, bits, N, "gptq_v2") == 2**bits - 1  # (G, N)
    if bits == 3:  # fields 10 and 21 lie across words and are left out
        whole = ones[:, : N // 32 * 32].reshape(len(ones), -1, 32)
        words = torch.cat([whole[..., 0:10], whole[..., 11:21], whole[..., 22:32]], 1)
    else:
        per_word = 32 // bits
        words = ones[:, : N // per_word * per_word].reshape(len(ones), -1, per_word)
    reaches_top = words.flip(-1).int().cumprod(-1).flip(-1).bool()  # ones from here to the top
    if bool((words & ~reaches_top).any()):
        return 0
    return int((words.sum(-1) - 1).clamp(min=0).sum())


def _offsets(qzeros: Tensor, bits: int) -> Tensor:
    constants = torch.tensor(WORD_OFFSETS[bits], dtype=torch.int64, device=qzeros.device)
    count = qzeros.shape[-1]
    return constants.repeat(-(-count // len(constants)))[:count].to(torch.int32)  # modulo 2**32
