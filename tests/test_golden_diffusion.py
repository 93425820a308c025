"""The diffusion process against outputs of the released code; the network is a formula (golden/README.md)."""
import numpy as np
import pytest
import torch
from conftest import load_golden

from adm_repro.diffusion import (
    GaussianDiffusion,
    bits_per_dim,
    hybrid_loss,
    kl_loss,
    named_betas,
    p_mean_variance,
    q_posterior_mean,
    q_sample,
    respaced_timesteps,
)

G = load_golden("diffusion.npz")
SCHEDULE = 1e-12  # absolute, float64
TENSOR = 2e-5  # of the expected standard deviation, float32
X_START, EPS, T = (torch.tensor(G[f"batch/{k}"]) for k in ("x_start", "noise", "t"))


def formula(x, t, learned=True):
    tt = t.float().view(-1, 1, 1, 1)
    s = torch.sin(1.7 * x + tt / 311)
    return torch.cat([s, torch.cos(0.9 * x - tt / 177)], 1) if learned else s


def assert_near(got, expected, tolerance=TENSOR):
    expected = torch.as_tensor(expected)
    assert (got - expected).abs().max() <= tolerance * max(expected.std(), expected.abs().mean())


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("table", ["betas", "alphas_cumprod", "posterior_variance", "posterior_log_variance_clipped",
                                   "posterior_mean_coef1", "posterior_mean_coef2"])
def test_schedule_tables(schedule, table):
    ours = getattr(GaussianDiffusion(named_betas(schedule, 1000)), table)
    assert ours.dtype == torch.float64
    np.testing.assert_allclose(ours, G[f"schedule/{schedule}/1000/{table}"], rtol=SCHEDULE, atol=SCHEDULE)


RESPACINGS = sorted({key.split("/")[1] for key in G.files if key.startswith("respacing/")})


@pytest.mark.parametrize("respacing", RESPACINGS)
def test_respacing(respacing):
    text = "" if respacing == "all" else respacing
    walk = GaussianDiffusion(named_betas("linear", 1000)).respaced(text)
    assert walk.timesteps.tolist() == G[f"respacing/{respacing}/timesteps"].tolist() == respaced_timesteps(1000, text)
    np.testing.assert_allclose(walk.betas, G[f"respacing/{respacing}/betas"], rtol=SCHEDULE, atol=SCHEDULE)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
class TestOneBatch:
    def test_forward_and_posterior(self, schedule):
        d = GaussianDiffusion(named_betas(schedule, 1000))
        x_t = q_sample(d, X_START, T, EPS)
        assert_near(x_t, G[f"{schedule}/q_sample"])
        assert_near(q_posterior_mean(d, X_START, x_t, T), G[f"{schedule}/posterior_mean"])
        log_var = d.at("posterior_log_variance_clipped", T, x_t).expand_as(x_t)
        assert_near(log_var, G[f"{schedule}/posterior_log_variance"])

    @pytest.mark.parametrize("variance", ["learned_range", "fixed_large", "fixed_small"])
    def test_reverse_step_and_losses(self, schedule, variance):
        d = GaussianDiffusion(named_betas(schedule, 1000), variance=variance)
        x_t = q_sample(d, X_START, T, EPS)
        output = formula(x_t, T, variance == "learned_range")
        p, prefix = p_mean_variance(d, output, x_t, T), f"{schedule}/{variance}/"
        assert_near(p.mean, G[prefix + "p_mean"])
        assert_near(p.log_variance, G[prefix + "p_log_variance"])
        assert_near(p.pred_xstart, G[prefix + "p_pred_xstart"])
        losses = hybrid_loss(d, output, X_START, x_t, T, EPS)
        assert_near(losses.mse, G[prefix + "loss_mse"])
        assert_near(losses.loss, G[prefix + "loss_loss"])
        if variance == "learned_range":
            assert_near(losses.vlb, G[prefix + "loss_vb"])
        else:
            assert losses.vlb is None

    def test_kl_and_rescaled_objectives(self, schedule):
        d = GaussianDiffusion(named_betas(schedule, 1000))
        x_t = q_sample(d, X_START, T, EPS)
        output = formula(x_t, T)
        assert_near(kl_loss(d, output, X_START, x_t, T), G[f"{schedule}/kl/loss"])
        assert_near(hybrid_loss(d, output, X_START, x_t, T, EPS).loss, G[f"{schedule}/rescaled_mse/loss"])

    def test_bits_per_dim_in_20_steps(self, schedule):
        d = GaussianDiffusion(named_betas(schedule, 1000)).respaced("20")
        draw = np.random.RandomState(13)  # the golden run drew its noise in this order
        bpd = bits_per_dim(d, formula, X_START, lambda step: torch.tensor(draw.standard_normal(X_START.shape), dtype=torch.float32))
        for name, got in (("total_bpd", bpd.total), ("prior_bpd", bpd.prior), ("vb", bpd.vlb), ("xstart_mse", bpd.xstart_mse), ("mse", bpd.eps_mse)):
            # the prior term is a difference of nearly equal numbers: 1e-5 bits is float32's resolution there
            np.testing.assert_allclose(got, G[f"{schedule}/bpd20/{name}"], rtol=2e-4, atol=2e-7, err_msg=name)
