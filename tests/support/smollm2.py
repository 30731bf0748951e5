"""SmolLM2-135M-Instruct: its greedy tokens for some prompts.

``tests/model/test_parity.py`` compares them with transformers. So the other tests need not load the
model in transformers too, which takes half a minute.
"""

from __future__ import annotations

# Random prompts, each with the tokens that follow.
GREEDY: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = (
    (
        (35938, 5005, 22681, 39242, 39714),
        (16863, 365, 34, 32, 33, 34, 25, 198),
    ),
    (
        (
            18930, 5701, 33462, 22549, 25767, 27246, 1239, 2136, 6815, 29161, 42759, 14749, 22926,
            5621, 32646, 21597, 39848, 35555, 27517, 47888,
        ),
        (30, 198, 198, 504, 805, 2775, 338, 553),
    ),
    (
        (
            13081, 29325, 11186, 14398, 28453, 26759, 44206, 44829, 36887, 34325, 12888, 35644,
            44178, 27701, 19571, 18254, 33564, 14425, 26936, 30982, 33814, 9433, 20142, 19632,
            38492, 46414, 42298, 30910, 26053, 40515, 6517, 47927, 24084, 9133, 17323, 9847, 45142,
            22343, 4556, 36199, 26091, 10719, 27220, 40988, 42965, 27935, 30595, 18450, 40483,
            43229,
        ),
        (744, 520, 395, 93, 1324, 89, 744, 520),
    ),
)  # fmt: skip
