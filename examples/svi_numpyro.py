"""A stock NumPyro SVI script, the VAE of NumPyro's own examples in short; one import line is changed.

    from numpyro.infer import SVI   →   from probgen.numpyro import SVI

`run` then draws minibatches inside one compiled loop.
"""

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import optax
from flax import linen as nn
from numpyro.contrib.module import flax_module
from numpyro.infer import Trace_ELBO
from sklearn.datasets import load_digits

from probgen.numpyro import SVI

HIDDEN, Z = 64, 8


def model(x):
    decode = flax_module("decoder", nn.Sequential([nn.Dense(HIDDEN), nn.relu, nn.Dense(64)]), input_shape=(1, Z))
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(jnp.zeros(Z), 1.0).to_event(1))
        numpyro.sample("x", dist.Bernoulli(logits=decode(z)).to_event(1), obs=x)


def guide(x):
    encode = flax_module("encoder", nn.Sequential([nn.Dense(HIDDEN), nn.relu, nn.Dense(2 * Z)]), input_shape=(1, 64))
    with numpyro.plate("data", len(x)):
        mean, log_scale = jnp.split(encode(x), 2, axis=-1)
        numpyro.sample("z", dist.Normal(mean, jnp.exp(log_scale)).to_event(1))


if __name__ == "__main__":
    x = jnp.asarray(load_digits().data > 8, dtype=float)
    svi = SVI(model, guide, optax.adam(1e-3), Trace_ELBO())
    result = svi.run(jax.random.key(0), 2000, x, batch_size=128)
    print(f"loss per digit: {result.losses[0] / len(x):.2f} → {result.losses[-100:].mean() / len(x):.2f} nats")
