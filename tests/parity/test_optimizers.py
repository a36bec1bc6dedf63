"""torch's optimisers and schedulers give the same parameters for the same gradients."""

import jax.numpy as jnp
import numpy as np
import pytest

from detectax_eqx.train import adamw, sgd, warmup_multistep


torch = pytest.importorskip("torch", reason="torch is not installed; `make parity` runs this in its own environment")

STEPS, WARMUP, MILESTONES, RATE = 60, 10, [30, 45], 0.02


def _torch_scheduler(optimizer):
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1e-3, total_iters=WARMUP)
    decay = torch.optim.lr_scheduler.MultiStepLR(optimizer, MILESTONES, gamma=0.1)
    return torch.optim.lr_scheduler.ChainedScheduler([warmup, decay])


CASES = {
    "sgd": (sgd, lambda p: torch.optim.SGD(p, RATE, momentum=0.9, weight_decay=0.01)),
    "adamw": (adamw, lambda p: torch.optim.AdamW(p, RATE, weight_decay=0.01)),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", CASES)
def test_the_same_parameters_after_every_step(name):
    build, torch_build = CASES[name]
    schedule = warmup_multistep(RATE, milestones=MILESTONES, warmup_steps=WARMUP)
    optimizer = build(schedule, weight_decay=0.01)
    random = np.random.default_rng(0)
    parameter = jnp.asarray(random.normal(size=20), jnp.float32)
    theirs = torch.nn.Parameter(torch.tensor(np.asarray(parameter)))
    torch_optimizer = torch_build([theirs])
    scheduler = _torch_scheduler(torch_optimizer)
    state = optimizer.init(parameter)
    for step in range(STEPS):
        np.testing.assert_allclose(schedule(step), torch_optimizer.param_groups[0]["lr"], rtol=1e-5)
        gradient = random.normal(size=20).astype(np.float32)
        update, state = optimizer.update(jnp.asarray(gradient), state, parameter)
        parameter = parameter + update
        theirs.grad = torch.tensor(gradient)
        torch_optimizer.step()
        scheduler.step()
        np.testing.assert_allclose(parameter, theirs.detach().numpy(), atol=1e-5)
