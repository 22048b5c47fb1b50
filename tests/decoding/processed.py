"""Temperature, top-k and top-p as transformers orders them, in plain NumPy."""

import numpy as np


def processed(logits, temperature: float, top_k: int = 0, top_p: float = 1.0) -> np.ndarray:
    """float64 [V]: the next-token probabilities of one row of logits. Temperature 0 is the argmax."""
    logits = np.asarray(logits, np.float64)
    if temperature == 0:
        return np.eye(len(logits))[np.argmax(logits)]
    weights = np.exp((logits - logits.max()) / temperature)
    if top_k:
        kth = sorted(logits, reverse=True)[min(top_k, len(logits)) - 1]
        weights[logits < kth] = 0  # ties at the k-th are kept
    weights /= weights.sum()
    if top_p < 1:
        kept, mass = [], 0.0
        for token in sorted(range(len(weights)), key=lambda token: -weights[token]):
            kept.append(token)
            mass += weights[token]
            if mass >= top_p:
                break
        cut = np.zeros_like(weights)
        cut[kept] = weights[kept]
        weights = cut / cut.sum()
    return weights
