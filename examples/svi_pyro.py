"""The VAE of Pyro's tutorial on handwritten digits, with its stock loop; one import line differs.

    python examples/svi_pyro.py            # compiled
    python examples/svi_pyro.py --stock    # pyro.infer.SVI itself: the same losses

The second step compiles, some seconds on a CPU, so `--epochs` decides who is done first.
"""

import argparse
import time

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from pyro.optim import Adam
from sklearn.datasets import load_digits
from torch import nn

from probgen.pyro import SVI  # instead of: from pyro.infer import SVI


class VAE(nn.Module):
    def __init__(self, z_dim=8, hidden_dim=64):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, hidden_dim), nn.Softplus(), nn.Linear(hidden_dim, 2 * z_dim))
        self.decoder = nn.Sequential(nn.Linear(z_dim, hidden_dim), nn.Softplus(), nn.Linear(hidden_dim, 64))
        self.z_dim = z_dim

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            z_loc = x.new_zeros((x.shape[0], self.z_dim))
            z_scale = x.new_ones((x.shape[0], self.z_dim))
            z = pyro.sample("latent", dist.Normal(z_loc, z_scale).to_event(1))
            pyro.sample("obs", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            z_loc, z_log_scale = self.encoder(x).chunk(2, dim=-1)
            pyro.sample("latent", dist.Normal(z_loc, z_log_scale.exp()).to_event(1))


def main(svi_class=SVI, epochs=30, batch_size=64, learning_rate=1e-3, verbose=True):
    """Train; returns minus the ELBO of every epoch, in nats per image."""
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    images = torch.tensor(load_digits().data > 7, dtype=torch.float32)
    loader = torch.utils.data.DataLoader(images, batch_size=batch_size, shuffle=True, drop_last=True)

    vae = VAE()
    svi = svi_class(vae.model, vae.guide, Adam({"lr": learning_rate}), loss=Trace_ELBO())

    losses, start = [], time.time()
    for epoch in range(epochs):
        epoch_loss = sum(svi.step(x) for x in loader)
        losses.append(epoch_loss / (len(loader) * batch_size))
        if verbose and (epoch + 1) % 10 == 0:
            print(f"[epoch {epoch + 1:03d}] average training loss: {losses[-1]:.4f}  ({time.time() - start:.1f} s)")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--stock", action="store_true", help="train with pyro.infer.SVI")
    args = parser.parse_args()
    main(pyro.infer.SVI if args.stock else SVI, args.epochs)
