"""MrT5: the learned gate in soft and hard form, its baselines, and the span corruption that it is trained with."""

import numpy as np

from tokjax.data import corruption

INPUTS = ("raw_token_ids", "input_length", "noise_density", "mean_noise_span_length", "numpy_default_rng_seed")
TOLERANCE = {"*": (0.0, 0.0)}


def run(case, arrays):
    kind = next(kind for prefix, kind in CASES.items() if case.stem.startswith(prefix))
    ours = kind(case, arrays)
    return {name: value for name, value in ours.items() if name in arrays}


def span_corruption(case, arrays):
    ids, rng = arrays["raw_token_ids"], np.random.default_rng(int(arrays["numpy_default_rng_seed"]))
    density, mean_span = (round(float(arrays[name]), 6) for name in ("noise_density", "mean_noise_span_length"))
    tokens, target = corruption.lengths(int(arrays["input_length"]), density, mean_span)
    noise = np.stack([corruption.noise_mask(ids.shape[1], rng, density, mean_span) for _ in ids])
    inputs, labels = corruption.corrupt(ids, noise)
    return {
        "noise_mask": noise.astype(np.int32),
        "input_ids": inputs,
        "labels": labels,
        "decoder_input_ids": corruption.shift_right(labels),
        "tokens_length": np.int32(tokens),
        "targets_length": np.int32(target),
    }


def span_lengths(case, arrays):
    name = "rows_inputlen_density_meanspan_tokenslen_targetslen"
    with np.load(case) as file:  # the first three columns are the question
        questions = file[name][:, :3]
    return {name: [(*row, *corruption.lengths(int(row[0]), row[1], row[2])) for row in questions.tolist()]}


CASES = {"span_corruption": span_corruption, "span_lengths": span_lengths}
