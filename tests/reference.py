"""Plain NumPy twins of the model's parts: float64, one loop per axis, no cleverness."""

import math

import numpy as np


def softmax(x):
    """Over the last axis."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def rms_norm(x, scale, eps):
    """x / rms(x) * scale, vector by vector."""
    x = np.asarray(x, np.float64)
    out = np.empty_like(x)
    for where in np.ndindex(x.shape[:-1]):
        mean_square = sum(float(v) ** 2 for v in x[where]) / x.shape[-1]
        out[where] = x[where] / math.sqrt(mean_square + eps) * np.asarray(scale, np.float64)
    return out


def frequencies(rope, head_width):
    """Angular step of each pair and the factor on cos and sin, pair by pair, after transformers."""
    steps = []
    for i in range(head_width // 2):
        base = rope.theta ** (-2 * i / head_width)
        if rope.kind == "linear":
            base /= rope.factor
        elif rope.kind == "llama3":
            wavelength = 2 * math.pi / base
            if wavelength > rope.original_context / rope.low_freq_factor:
                base /= rope.factor
            elif wavelength >= rope.original_context / rope.high_freq_factor:
                smooth = rope.original_context / wavelength - rope.low_freq_factor
                smooth /= rope.high_freq_factor - rope.low_freq_factor
                base = (1 - smooth) * base / rope.factor + smooth * base
        elif rope.kind == "yarn":
            bounds = []
            for turns, rounded in ((rope.beta_fast, math.floor), (rope.beta_slow, math.ceil)):
                pair = head_width * math.log(rope.original_context / (turns * 2 * math.pi)) / 2 / math.log(rope.theta)
                bounds.append(rounded(pair) if rope.truncate else pair)
            low, high = max(bounds[0], 0), min(bounds[1], head_width - 1)
            ramp = min(max((i - low) / (high - low if high != low else 0.001), 0), 1)
            base = base / rope.factor * ramp + base * (1 - ramp)
        steps.append(base)
    factor = 1.0
    if rope.kind == "yarn":

        def magnitude(scale):
            return 1.0 if rope.factor <= 1 else 0.1 * scale * math.log(rope.factor) + 1

        factor = rope.attention_factor
        if factor is None and rope.mscale and rope.mscale_all_dim:
            factor = magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
        elif factor is None:
            factor = magnitude(1)
    return np.array(steps), factor


def rotate(x, positions, rope):
    """x [B, T, heads, H] at positions [B, T]: entry i turns with entry i + H/2."""
    x = np.asarray(x, np.float64)
    B, T, heads, H = x.shape
    steps, factor = frequencies(rope, H)
    out = np.empty_like(x)
    for b, t, n, i in np.ndindex(B, T, heads, H // 2):
        angle = float(positions[b, t]) * steps[i]
        cos, sin = math.cos(angle) * factor, math.sin(angle) * factor
        first, second = x[b, t, n, i], x[b, t, n, i + H // 2]
        out[b, t, n, i] = first * cos - second * sin
        out[b, t, n, i + H // 2] = second * cos + first * sin
    return out


def attention(q, k, v, visible):
    """q [B, T, N, H] over k, v [B, S, K, H] where visible [B, T, S]; query head n reads head n // (N / K)."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    B, T, N, H = q.shape
    group = N // k.shape[2]
    out = np.zeros_like(q)
    for b, t, n in np.ndindex(B, T, N):
        seen = [s for s in range(k.shape[1]) if visible[b, t, s]]
        weights = softmax(np.array([q[b, t, n] @ k[b, s, n // group] for s in seen]) / math.sqrt(H))
        for s, weight in zip(seen, weights, strict=True):
            out[b, t, n] += weight * v[b, s, n // group]
    return out


def gated_mlp(x, gate, up, down):
    """One vector through down(silu(gate x) * (up x))."""
    x, gate, up, down = (np.asarray(a, np.float64) for a in (x, gate, up, down))
    h = gate @ x
    return down @ (h / (1 + np.exp(-h)) * (up @ x))


def experts(x, router, gate, up, down, top, normalise):
    """Rows x [R, D] through their `top` likeliest experts, row by row."""
    x = np.asarray(x, np.float64)
    out = np.zeros_like(x)
    for row, vector in enumerate(x):
        scores = softmax(np.asarray(router, np.float64) @ vector)
        chosen = sorted(range(len(scores)), key=lambda e: -scores[e])[:top]
        total = sum(scores[e] for e in chosen) if normalise else 1.0
        for e in chosen:
            out[row] += scores[e] / total * gated_mlp(vector, gate[e], up[e], down[e])
    return out


def layer(params, i):
    """Weights of one layer, [out, in], from stacked or unrolled parameters."""
    layers = params["layers"]
    if "input_norm" in layers:
        return {name: np.asarray(stack, np.float64)[i] for name, stack in layers.items()}
    return {name: np.asarray(weight, np.float64) for name, weight in layers[i].items()}


def forward(config, params, tokens, positions=None, visible=None):
    """Logits [B, T, V] of tokens [B, T]; causal unless visible [B, T, T] says otherwise."""
    tokens = np.asarray(tokens)
    B, T = tokens.shape
    positions = np.broadcast_to(np.arange(T), (B, T)) if positions is None else positions
    visible = np.broadcast_to(np.tril(np.ones((T, T), bool)), (B, T, T)) if visible is None else visible
    x = np.asarray(params["embed"], np.float64)[tokens]
    for i in range(config.layers):
        w = layer(params, i)
        h = rms_norm(x, w["input_norm"], config.norm_eps)
        split = {}
        for name, heads in (("q", config.heads), ("k", config.kv_heads), ("v", config.kv_heads)):
            y = (h @ w[name].T + w.get(f"{name}_bias", 0)).reshape(B, T, heads, config.head_width)
            if config.qk_norm and name != "v":
                y = rms_norm(y, w[f"{name}_norm"], config.norm_eps)
            split[name] = y if name == "v" else rotate(y, positions, config.rope)
        x = x + attention(split["q"], split["k"], split["v"], visible).reshape(B, T, -1) @ w["o"].T
        h = rms_norm(x, w["post_norm"], config.norm_eps)
        if config.experts:
            stacks = [np.asarray(params["experts"][name][i]) for name in ("gate", "up", "down")]
            rows = h.reshape(B * T, -1)
            out = experts(rows, w["router"], *stacks, config.experts_per_token, config.normalise_router)
            x = x + out.reshape(x.shape)
        else:
            for where in np.ndindex(B, T):
                x[where] += gated_mlp(h[where], w["gate"], w["up"], w["down"])
    x = rms_norm(x, params["norm"], config.norm_eps)
    return x @ np.asarray(params["embed" if config.tied else "head"], np.float64).T


def convolve(x, base, projection, side, source, group):
    """Rows x [W, D] of a block summed with those before them; kernels come of `source` rows [W, D]."""
    W, D = x.shape
    kernel = base.shape[1]
    out = np.zeros_like(x)
    for j, tap, d in np.ndindex(W, kernel, D):
        if j >= tap:
            dynamic = (projection @ source[j]).reshape(2, kernel, D // group)
            out[j, d] += (base[side, tap, d] + dynamic[side, tap, d // group]) * x[j - tap, d]
    return out


def conditioned(config, params, x, tapped):
    """Final hidden states [W, D] of one row's block x [W, D] behind the context of tapped [S, n*D']."""
    x, (W, S) = np.asarray(x, np.float64), (len(x), len(tapped))
    K, H = config.kv_heads, config.head_width
    c = rms_norm(np.asarray(tapped, np.float64) @ np.asarray(params["fc"], np.float64).T,
                 params["hidden_norm"], config.norm_eps)  # fmt: skip
    positions = np.arange(S + W)

    def split(w, name, rows, heads, at):
        y = (rows @ w[name].T + w.get(f"{name}_bias", 0)).reshape(1, len(rows), heads, H)
        if config.qk_norm and name != "v":
            y = rms_norm(y, w[f"{name}_norm"], config.norm_eps)
        return y if name == "v" else rotate(y, at[None], config.rope)

    for i in range(config.layers):
        w = layer(params, i)

        def sublayer(name, h, run, w=w):
            if not config.conv_kernel:
                return run(h)
            base, projection, group = w[f"{name}_base"], w[f"{name}_projection"], config.conv_group
            out = run(convolve(h, base, projection, 0, h, group))
            return convolve(out, base, projection, 1, h, group)

        def mix(h, w=w, i=i):
            visible = np.zeros((1, W, S + W), bool)
            for j, s in np.ndindex(W, S + W):
                window, apart = config.windows[i], S + j - s
                if config.window_from == "row":
                    seen = not window or abs(apart) < window
                else:
                    seen = not window or s >= S - window
                visible[0, j, s] = seen and (s < S or not config.causal[i] or apart >= 0)
            q = split(w, "q", h, config.heads, positions[S:])
            both = np.concatenate([c, h])
            k, v = split(w, "k", both, K, positions), split(w, "v", both, K, positions)
            return attention(q, k, v, visible).reshape(W, -1) @ w["o"].T + w.get("o_bias", 0)

        def mlp(h, w=w):
            return np.stack([gated_mlp(row, w["gate"], w["up"], w["down"]) for row in h])

        x = x + sublayer("attention_conv", rms_norm(x, w["input_norm"], config.norm_eps), mix)
        x = x + sublayer("mlp_conv", rms_norm(x, w["post_norm"], config.norm_eps), mlp)
    return rms_norm(x, params["norm"], config.norm_eps)


def eagle3(config, params, embed, tokens, tapped, chain):
    """The final state [D] that predicts behind a text and the drafted tokens of `chain`, every row computed anew.

    tokens: the text, whose last token the target has not read; tapped [S, n*D']: of those before it.
    """
    w, eps, S = layer(params, 0), config.norm_eps, len(tapped)
    K, H, D = config.kv_heads, config.head_width, config.width
    states = [np.zeros(D)]  # before each token; there is nothing before the first
    for row in np.asarray(tapped, np.float64):
        row = rms_norm(row, params["tapped_norm"], eps) if config.norm_tapped else row
        states.append(np.asarray(params["fc"], np.float64) @ row)
    text = [int(token) for token in tokens]
    first = min(1, S)  # the first token is no context
    for j in range(len(chain) + 1):
        rows = range(first, S + 1 + j)
        h = np.stack([states[t] for t in rows])
        normed = rms_norm(h, w["hidden_norm"], eps)
        read = np.concatenate([rms_norm(np.asarray(embed)[[text[t] for t in rows]], w["input_norm"], eps), normed], -1)
        split = {}
        for name, heads in (("q", config.heads), ("k", K), ("v", K)):
            y = (read @ w[name].T).reshape(1, len(rows), heads, H)
            if config.qk_norm and name != "v":
                y = rms_norm(y, w[f"{name}_norm"], eps)
            split[name] = y if name == "v" else rotate(y, np.array(rows)[None], config.rope)
        causal = np.tril(np.ones((1, len(rows), len(rows)), bool))
        mixed = attention(split["q"], split["k"], split["v"], causal).reshape(len(rows), -1)
        x = ((normed if config.norm_residual else h) + mixed @ w["o"].T)[-1]
        x = x + gated_mlp(rms_norm(x, w["post_norm"], eps), w["gate"], w["up"], w["down"])
        final = rms_norm(x, params["norm"], eps)
        states.append(final if config.norm_output else x)
        text += chain[j : j + 1]
    return final
