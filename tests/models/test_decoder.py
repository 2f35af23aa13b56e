"""The decoder against a naive float64 forward of one sequence per response, and its invariances."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rosepo_jax.models import decoder
from rosepo_jax.models.decoder import DecoderConfig, LanguageModel
from rosepo_jax.preference.logprobs import response_logps

CONFIG = DecoderConfig(vocabulary=29, width=16, layers=2, heads=4, kv_heads=2, head_dim=6, mlp_width=24)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 40,
}
LINEAR = {"rope_type": "linear", "factor": 3.0}
VARIANTS = {
    "grouped": CONFIG,
    "one_kv_head": dataclasses.replace(CONFIG, kv_heads=1),
    "all_kv_heads_untied": dataclasses.replace(CONFIG, kv_heads=4, tie_embeddings=False),
    "linear_rope": dataclasses.replace(CONFIG, rope_scaling=tuple(sorted(LINEAR.items()))),
    "llama3_rope": dataclasses.replace(CONFIG, rope_scaling=tuple(sorted(LLAMA3.items())), rope_theta=50.0),
    "window": dataclasses.replace(CONFIG, window=3, sliding=(True, True)),
    "biases": dataclasses.replace(CONFIG, biases=("attention/query", "attention/key", "attention/output", "mlp/down")),
    "query_key_norm": dataclasses.replace(CONFIG, query_key_norm=True, query_scale=0.7),
    "sandwich": dataclasses.replace(
        CONFIG,
        activation="gelu_tanh",
        post_norms=True,
        unit_offset=True,
        scale_embeddings=True,
        attention_cap=2.0,
        logit_cap=3.0,
        window=2,
        sliding=(True, False),
    ),
    "two_rope_bases": dataclasses.replace(
        CONFIG,
        rope_theta=500.0,
        local_rope_theta=20.0,
        rope_scaling=tuple(sorted(LINEAR.items())),
        query_key_norm=True,
        unit_offset=True,
        window=4,
        sliding=(True, False),
    ),
}


logps = jax.jit(response_logps, static_argnums=0)


def random_params(config, seed=0, **kinds):
    """Scales away from 1 and kernels large enough that attention is far from uniform."""
    generator = np.random.default_rng(seed)
    shapes = jax.eval_shape(LanguageModel(config, **kinds).init, jax.random.key(0))
    return {
        path: jnp.asarray(generator.normal(size=s.shape) * 0.5 + ("norm" in path and not config.unit_offset), s.dtype)
        for path, s in shapes.items()
    }


# ---- The naive forward: one unpadded sequence, one position and one head at a time, float64 ------------------------


def naive_frequencies(config, slides=False):
    if slides and config.local_rope_theta:
        config = dataclasses.replace(config, rope_theta=config.local_rope_theta, rope_scaling=None)
    frequency = config.rope_theta ** -(np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim)
    scaling = dict(config.rope_scaling or ())
    kind = scaling.get("rope_type", "default")
    if kind == "linear":
        return frequency / scaling["factor"]
    if kind == "llama3":
        original = scaling["original_max_position_embeddings"]
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        scaled = []
        for f in frequency:
            wavelength = 2 * math.pi / f
            if wavelength < original / high:
                scaled.append(f)
            elif wavelength > original / low:
                scaled.append(f / scaling["factor"])
            else:
                smooth = (original / wavelength - low) / (high - low)
                scaled.append((1 - smooth) * f / scaling["factor"] + smooth * f)
        return np.array(scaled)
    return frequency


def naive_norm(config, x, scale):
    return x / np.sqrt((x * x).mean() + config.norm_epsilon) * (scale + config.unit_offset)


def capped(x, cap):
    return cap * np.tanh(x / cap) if cap else x


def naive_block(config, w, slides, states):
    """One block over the states of all positions; `w` holds its parameters."""
    E, group = config.head_dim, config.heads // config.kv_heads
    frequency = naive_frequencies(config, slides)
    activate = {
        "silu": lambda x: x / (1 + np.exp(-x)),
        "gelu_tanh": lambda x: x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    }[config.activation]

    def norm(name, x):
        return naive_norm(config, x, w[f"{name}/scale"])

    def linear(name, x):
        return x @ w[f"{name}/kernel"] + w.get(f"{name}/bias", 0.0)

    def head(name, x, number):
        x = x[number * E : (number + 1) * E]
        return norm(f"attention/{name}_norm", x) if config.query_key_norm else x

    def rotated(x, position):
        pairs = (x[: E // 2] + 1j * x[E // 2 :]) * np.exp(1j * position * frequency)
        return np.concatenate([pairs.real, pairs.imag])

    normed = [norm("attention_norm", x) for x in states]
    query, key, value = ([linear(f"attention/{n}", x) for x in normed] for n in ("query", "key", "value"))
    after = []
    for s, x in enumerate(states):
        first = max(0, s + 1 - config.window) if slides else 0
        heads = []
        for h in range(config.heads):
            k = h // group
            q_head = rotated(head("query", query[s], h), s)
            k_heads = np.array([rotated(head("key", key[u], k), u) for u in range(first, s + 1)])
            v_heads = np.array([value[u][k * E : (k + 1) * E] for u in range(first, s + 1)])
            score = capped(k_heads @ q_head * (config.query_scale or 1 / math.sqrt(E)), config.attention_cap)
            weight = np.exp(score - score.max())
            heads.append(weight / weight.sum() @ v_heads)
        update = linear("attention/output", np.concatenate(heads))
        x = x + (norm("attention_post_norm", update) if config.post_norms else update)
        y = norm("mlp_norm", x)
        update = linear("mlp/down", activate(linear("mlp/gate", y)) * linear("mlp/up", y))
        after.append(x + (norm("mlp_post_norm", update) if config.post_norms else update))
    return after


def naive_logits(config, params, tokens):
    """Logits [S, V] after every token of one sequence."""
    p = {path: np.asarray(value, np.float64) for path, value in params.items()}
    states = [p["embedding"][token] * (math.sqrt(config.width) if config.scale_embeddings else 1) for token in tokens]
    for layer, slides in enumerate(config.sliding or (False,) * config.layers):
        w = {path.removeprefix("blocks/"): v[layer] for path, v in p.items() if path.startswith("blocks/")}
        states = naive_block(config, w, slides, states)
    kernel = p["embedding"].T if config.tie_embeddings else p["head/kernel"]
    return capped(np.array([naive_norm(config, x, p["norm/scale"]) for x in states]) @ kernel, config.logit_cap)


def naive_logp(config, params, prompt, response):
    logits = naive_logits(config, params, [*prompt, *response])[len(prompt) - 1 : -1]
    largest = logits.max(axis=1)
    normaliser = largest + np.log(np.exp(logits - largest[:, None]).sum(axis=1))
    return (logits[np.arange(len(response)), response] - normaliser).sum()


def naive_logps(config, params, prompts, responses):
    return np.array([[naive_logp(config, params, p, r) for r in row] for p, row in zip(prompts, responses)])


# ---- Batches of ragged prompts and responses ------------------------------------------------------------------------


def ragged(seed=0, prompt_lengths=(5, 1), response_lengths=((3, 1, 4), (2, 4, 1)), vocabulary=CONFIG.vocabulary):
    """Token lists; the responses of a row all differ in content."""
    generator = np.random.default_rng(seed)
    prompts = [generator.integers(0, vocabulary, n).tolist() for n in prompt_lengths]
    return prompts, [[generator.integers(0, vocabulary, n).tolist() for n in row] for row in response_lengths]


def padded(prompts, responses, extra_prompt=0, extra_response=0, pad=0):
    """prompt_BxP, prompt_mask_BxP, response_BxRxT, response_mask_BxRxT."""

    def fill(rows, width):
        tokens = np.full((len(rows), width), pad, np.int32)
        mask = np.zeros((len(rows), width), bool)
        for index, row in enumerate(rows):
            tokens[index, : len(row)], mask[index, : len(row)] = row, True
        return tokens, mask

    flat = [response for row in responses for response in row]
    prompt = fill(prompts, max(map(len, prompts)) + extra_prompt)
    tokens, mask = fill(flat, max(map(len, flat)) + extra_response)
    shape = (len(responses), len(responses[0]), -1)
    return *prompt, tokens.reshape(shape), mask.reshape(shape)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_shared_prefix_equals_one_float64_sequence_per_response(config):
    prompts, responses = ragged()
    params = random_params(config)
    logps_BxR = logps(LanguageModel(config), params, *padded(prompts, responses, extra_prompt=2))
    np.testing.assert_allclose(logps_BxR, naive_logps(config, params, prompts, responses), rtol=1e-5)


def test_gradient_equals_one_sequence_per_response():
    """The same model, prompt repeated before every response and no sharing: log-probs and gradients agree."""
    lm, params = LanguageModel(CONFIG), PARAMS
    prompts, responses = ragged()
    weight_BxR = np.array([[1.0, -0.7, 0.3], [-0.2, 0.9, 0.5]], np.float32)

    def shared(params):
        return (weight_BxR * response_logps(lm, params, *padded(prompts, responses, 1, 1))).sum()

    def apart(params):
        alone = [(prompt, [response]) for prompt, row in zip(prompts, responses) for response in row]
        return (weight_BxR.reshape(-1, 1) * response_logps(lm, params, *padded(*zip(*alone)))).sum()

    value, gradient = jax.jit(jax.value_and_grad(shared))(params)
    expected_value, expected = jax.jit(jax.value_and_grad(apart))(params)
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    for path, want in expected.items():
        error = np.linalg.norm(gradient[path] - want) / np.linalg.norm(want)
        assert error < 1e-5, (path, error)


def test_gradient_equals_central_differences_of_the_float64_forward():
    """d/ds of the naive preference loss along random directions, which no float32 step size could resolve."""
    config = VARIANTS["all_kv_heads_untied"]
    prompts, responses = ragged()
    params = random_params(config)
    reference_BxR = naive_logps(config, params, prompts, responses) + np.array([[0.3, -0.5, 0.9], [-1.1, 0.2, 0.4]])
    epsilon, beta = 0.2, 0.7

    def naive_loss(params):
        a_BxR = naive_logps(config, params, prompts, responses) - reference_BxR
        u_BxK = beta * (a_BxR[:, :1] - a_BxR[:, 1:])
        return (np.log1p(np.exp(-u_BxK)) + epsilon * u_BxK).mean()

    def loss(params):
        logps_BxR = response_logps(LanguageModel(config), params, *padded(prompts, responses))
        a_BxR = logps_BxR - reference_BxR.astype(np.float32)
        u_BxK = beta * (a_BxR[:, :1] - a_BxR[:, 1:])
        return (jax.nn.softplus(-u_BxK) + epsilon * u_BxK).mean()

    gradient = jax.jit(jax.grad(loss))(params)
    generator = np.random.default_rng(1)
    for path in params:
        direction = generator.normal(size=params[path].shape)
        value = np.asarray(params[path], np.float64)
        up, down = (naive_loss({**params, path: value + step * direction}) for step in (1e-5, -1e-5))
        np.testing.assert_allclose((gradient[path] * direction).sum(), (up - down) / 2e-5, rtol=1e-4, atol=1e-5)


def test_llama3_scaling_uses_its_three_bands():
    """The variant above is a test only if some wavelengths are kept, some stretched and some in between."""
    config = VARIANTS["llama3_rope"]
    plain = naive_frequencies(dataclasses.replace(config, rope_scaling=None))
    ratio = naive_frequencies(config) / plain
    assert ratio.max() == 1.0 and ratio.min() == 1 / LLAMA3["factor"]
    assert np.any((ratio < 1) & (ratio > 1 / LLAMA3["factor"]))
    np.testing.assert_allclose(decoder.rope_frequencies(config), [naive_frequencies(config)], rtol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([0, 3]), st.sampled_from([0, 4]), st.integers(0, CONFIG.vocabulary - 1))
def test_any_padding_gives_the_same_logps(extra_prompt, extra_response, pad):
    prompts, responses = ragged()
    logps_BxR = logps(LanguageModel(CONFIG), PARAMS, *padded(prompts, responses, extra_prompt, extra_response, pad))
    np.testing.assert_allclose(logps_BxR, EXPECTED, rtol=1e-5)


PARAMS = random_params(CONFIG)
EXPECTED = naive_logps(CONFIG, PARAMS, *ragged())


def test_padding_has_no_gradient_and_leaks_no_nan():
    """A NaN in the embedding of the pad id would reach every gradient if padding were used anywhere."""
    prompts, responses = ragged(vocabulary=CONFIG.vocabulary - 1)
    pad = CONFIG.vocabulary - 1
    config = dataclasses.replace(CONFIG, tie_embeddings=False)
    params = random_params(config)
    batch = padded(prompts, responses, 3, 2, pad)
    gradient = jax.jit(jax.grad(lambda p: response_logps(LanguageModel(config), p, *batch).sum()))(params)
    assert all(np.isfinite(value).all() for value in gradient.values())
    assert not np.any(gradient["embedding"][pad])
    assert np.any(gradient["embedding"][prompts[1][0]])


def test_one_response_token_each():
    prompts, responses = ragged(response_lengths=((1, 1), (1, 1)))
    batch = padded(prompts, responses)
    logps_BxR = logps(LanguageModel(CONFIG), PARAMS, *batch)
    np.testing.assert_allclose(logps_BxR, naive_logps(CONFIG, PARAMS, prompts, responses), rtol=1e-5)
    gradient = jax.jit(jax.grad(lambda p: response_logps(LanguageModel(CONFIG), p, *batch).sum()))(PARAMS)
    assert all(np.isfinite(value).all() for value in gradient.values())


@pytest.mark.parametrize("name", ["llama3_rope", "all_kv_heads_untied", "window", "sandwich", "two_rope_bases"])
def test_prefill_and_extend_equal_the_scoring_forward(name):
    """Decoding token by token gives the logits of `hidden`, whatever lies in the cache behind the current depth, and
    wherever a response's earlier tokens were fed."""
    config = VARIANTS[name]
    lm, params = LanguageModel(config, unrolled=name == "sandwich"), random_params(config)
    prompts, responses = ragged(response_lengths=((5, 5, 5), (5, 5, 5)))
    prompt, mask, response, _ = padded(prompts, responses, extra_prompt=2)
    B, W, T = response.shape
    expected = jax.jit(lambda p: lm.logits(p, lm.hidden(p, prompt, mask, response)))(params)
    first, cache = jax.jit(lm.prefill)(params, prompt, mask)
    np.testing.assert_allclose(first, expected[:, 0, 0], rtol=1e-4, atol=1e-4)
    suffix = jax.tree.map(lambda x: x + 7.0, lm.empty_suffix(B, W, T))
    extend = jax.jit(lm.extend)
    # Response w is fed at place line[b, w, depth], another one in every step.
    line = np.random.default_rng(3).permuted(np.broadcast_to(np.arange(W)[None, :, None], (B, W, T)), axis=1)
    shuffled = suffix
    for depth in range(T - 1):
        logits, suffix = extend(params, cache, suffix, response[:, :, depth], depth)
        np.testing.assert_allclose(logits, expected[:, :, depth + 1], rtol=1e-4, atol=1e-4)
        place = line[:, :, depth]
        # Whoever is fed at place p is the response w with line[b, w, depth] == p.
        who = np.argsort(place, axis=1)
        tokens, lines = np.take_along_axis(response[:, :, depth], who, 1), np.take_along_axis(line, who[..., None], 1)
        logits, shuffled = extend(params, cache, shuffled, tokens, depth, lines)
        logits = np.take_along_axis(np.asarray(logits), place[..., None], 1)
        np.testing.assert_allclose(logits, expected[:, :, depth + 1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_layers_written_out_compute_what_a_loop_does(name):
    """Loops over layers and layers one after the other: log-probs, their gradient, and a step of decoding."""
    lm = LanguageModel(VARIANTS[name])
    written = dataclasses.replace(lm, unrolled=True)
    params, batch = random_params(lm.config), padded(*ragged())

    def found(lm):
        value, gradient = jax.jit(jax.value_and_grad(lambda p: response_logps(lm, p, *batch).sum()))(params)
        _, cache = lm.prefill(params, *batch[:2])
        B = len(batch[0])
        step, _ = lm.extend(params, cache, lm.empty_suffix(B, 1, 2), batch[2][:, 0, :1], jnp.int32(0))
        return {"value": value, "step": step, **gradient}

    looped = found(lm)
    for path, value in found(written).items():
        error = np.linalg.norm(value - looped[path]) / np.linalg.norm(looped[path])
        assert error < 1e-5, (path, error)


def test_remat_changes_no_number():
    batch = padded(*ragged())

    def loss(remat):
        lm = LanguageModel(CONFIG, remat=remat)
        return jax.jit(jax.value_and_grad(lambda p: response_logps(lm, p, *batch).sum()))(PARAMS)

    expected_value, expected = loss("none")
    for remat in ("full", "dots"):
        value, gradient = loss(remat)
        np.testing.assert_allclose(value, expected_value, rtol=1e-6)
        for path in expected:
            np.testing.assert_allclose(gradient[path], expected[path], rtol=1e-5, atol=1e-5)


def test_bfloat16_computes_near_float32_and_keeps_logps_in_float32():
    batch = padded(*ragged())
    half = LanguageModel(CONFIG, dtype="bfloat16")
    params = half.init(jax.random.key(3))
    hidden = jax.eval_shape(half.hidden, params, *batch[:3])
    logps_BxR = logps(half, params, *batch)
    assert hidden.dtype == jnp.bfloat16 and logps_BxR.dtype == jnp.float32
    np.testing.assert_allclose(logps_BxR, logps(LanguageModel(CONFIG), params, *batch), rtol=0.02, atol=0.1)


def test_parameter_dtype_and_determinism_of_init():
    lm = LanguageModel(CONFIG, param_dtype="bfloat16")
    one, two, other = (lm.init(jax.random.key(seed)) for seed in (1, 1, 2))
    assert {value.dtype for value in one.values()} == {jnp.dtype("bfloat16")}
    assert all(np.array_equal(one[path], two[path]) for path in one)
    assert not np.array_equal(one["embedding"], other["embedding"])
    assert not np.array_equal(one["blocks/mlp/up/kernel"][0], one["blocks/mlp/up/kernel"][1])


def test_prompt_states_are_the_mean_over_real_tokens():
    prompts, _ = ragged(prompt_lengths=(5, 1, 3))
    tokens, mask, *_ = padded(prompts, [[[1]]] * 3, extra_prompt=2, pad=4)
    lm = LanguageModel(CONFIG)
    states = jax.jit(lm.prompt_states)
    states_BxD = states(PARAMS, tokens, mask)
    assert states_BxD.shape == (3, CONFIG.width) and states_BxD.dtype == jnp.float32
    for prompt, state in zip(prompts, states_BxD):
        alone = states(PARAMS, np.array([prompt], np.int32), np.ones((1, len(prompt)), bool))[0]
        np.testing.assert_allclose(state, alone, rtol=1e-5, atol=1e-5)
    # Of a prompt of one token the mean is its state, from which `prefill` predicts.
    np.testing.assert_allclose(
        lm.logits(PARAMS, states_BxD[1]), jax.jit(lm.prefill)(PARAMS, tokens, mask)[0][1], rtol=1e-4, atol=1e-4
    )
