"""The formula of attention and its gradients in float64, by hand: no code of the model's, and none of XLA's."""

import numpy as np


def attention(q_BSNH, k_BSKH, v_BSKH, cotangent_BSNH, *, window=None, segment_ids=None, steps=None):
    """(out, dq, dk, dv) of `sum(cotangent * softmax(q k^T) v)`, causal or by steps; each query head has the keys of its
    group."""
    q, k, v, cotangent = (np.asarray(x).astype(np.float64) for x in (q_BSNH, k_BSKH, v_BSKH, cotangent_BSNH))
    groups = q.shape[2] // k.shape[2]
    # Heads first: then they are products of matrices.
    q, k, v, cotangent = (
        np.swapaxes(x, 1, 2) for x in (q, np.repeat(k, groups, 2), np.repeat(v, groups, 2), cotangent)
    )
    S = q.shape[2]
    back_SS = np.arange(S)[:, None] - np.arange(S)
    seen = (back_SS >= 0) & (back_SS < (window or S))
    if steps is not None:
        earlier = np.asarray(steps)[:, None, :] <= np.asarray(steps)[:, :, None]
        seen = (earlier & (np.abs(back_SS) < (window or S)))[:, None]
    if segment_ids is not None:
        ids = np.asarray(segment_ids)
        seen = seen & (ids[:, :, None] == ids[:, None, :])[:, None]
    logits = np.where(seen, q @ np.swapaxes(k, -1, -2), -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    d_weights = cotangent @ np.swapaxes(v, -1, -2)
    d_logits = weights * (d_weights - np.sum(weights * d_weights, -1, keepdims=True))
    across = lambda x: np.swapaxes(x, -1, -2)  # noqa: E731
    dk, dv = across(d_logits) @ q, across(weights) @ cotangent
    shared = lambda x: x.reshape(x.shape[0], -1, groups, *x.shape[2:]).sum(2)  # noqa: E731
    return [np.swapaxes(x, 1, 2) for x in (weights @ v, d_logits @ k, shared(dk), shared(dv))]
