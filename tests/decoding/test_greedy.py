import jax
import numpy as np
import pytest
from toy import EOS, ToyModel, logps, pad_prompts, random_params

from rosepo_jax.decoding.greedy import greedy
from rosepo_jax.models.decoder import DecoderConfig, LanguageModel
from rosepo_jax.preference.logprobs import response_logps

VOCABULARY = 5


def argmax_loop(params, prompt, max_tokens):
    tokens, total = [], 0.0
    while len(tokens) < max_tokens and EOS not in tokens:
        last = logps(params, prompt, np.array(tokens, int))[-1]
        tokens.append(int(last.argmax()))
        total += last.max()
    return tokens + [EOS] * (max_tokens - len(tokens)), total


@pytest.mark.parametrize("max_tokens", [1, 2, 9])
def test_equals_the_argmax_loop(max_tokens):
    rng = np.random.default_rng(0)
    ended = cut = 0
    for _ in range(20):
        params = random_params(rng, VOCABULARY)
        prompts = [rng.integers(1, VOCABULARY, rng.integers(1, 6)).tolist() for _ in range(4)]
        tokens, scores = greedy(ToyModel(), params, *pad_prompts(prompts, 6), max_tokens=max_tokens, eos=EOS)
        for row, prompt in enumerate(prompts):
            expected, total = argmax_loop(params, prompt, max_tokens)
            assert tokens[row].tolist() == expected
            np.testing.assert_allclose(scores[row], total, rtol=1e-5, atol=1e-5)
            ended += EOS in expected
            cut += EOS not in expected
    assert ended > 3
    assert cut > 3


def test_rows_do_not_depend_on_batch_or_padding():
    rng = np.random.default_rng(1)
    params = random_params(rng, VOCABULARY)
    prompts = [rng.integers(1, VOCABULARY, rng.integers(1, 6)).tolist() for _ in range(6)]
    tokens, scores = greedy(ToyModel(), params, *pad_prompts(prompts, 6), max_tokens=8, eos=EOS)
    for row, prompt in enumerate(prompts):
        alone, score = greedy(ToyModel(), params, *pad_prompts([prompt], 11, fill=3), max_tokens=8, eos=EOS)
        assert alone[0].tolist() == tokens[row].tolist()
        np.testing.assert_allclose(score[0], scores[row], rtol=1e-5)


def test_refuses_no_tokens():
    params = random_params(np.random.default_rng(0), VOCABULARY)
    with pytest.raises(ValueError, match="max_tokens"):
        greedy(ToyModel(), params, *pad_prompts([[1]], 1), max_tokens=0, eos=EOS)


def test_decoder_text_has_the_score_of_a_response():
    config = DecoderConfig(vocabulary=7, width=16, layers=2, heads=4, kv_heads=2, head_dim=4, mlp_width=24)
    lm = LanguageModel(config)
    params = {path: 6.0 * value if "embedding" in path else value for path, value in lm.init(jax.random.key(0)).items()}
    prompts, mask = pad_prompts([[1, 2, 3], [4], [5, 6, 5, 6], [2, 2]], 5)
    tokens, scores = map(np.asarray, greedy(lm, params, prompts, mask, max_tokens=8, eos=EOS))
    written = np.cumsum(tokens == EOS, axis=1) - (tokens == EOS) == 0
    expected = jax.jit(response_logps, static_argnums=0)(lm, params, prompts, mask, tokens[:, None], written[:, None])
    np.testing.assert_allclose(scores, expected[:, 0], rtol=1e-5, atol=1e-5)
    hidden = lm.hidden(params, prompts, mask, tokens[:, None])
    best = np.asarray(lm.logits(params, hidden)).argmax(axis=-1)[:, 0]
    np.testing.assert_array_equal(best[written], tokens[written])
