"""A GAN on several ranks, with torch alone: torchrun --nproc-per-node 2 plain_ddp.py"""

import torch
import torch.distributed as dist
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from gan_lib.base.weights import weights_checksum
from gan_lib.data import prepare_images
from gan_lib.data.pixels import normalise
from gan_lib.gan import Discriminator, Generator

dist.init_process_group("gloo")  # torchrun has told each process its rank, and where to meet
rank, world_size = dist.get_rank(), dist.get_world_size()

pixels = prepare_images("dog-silhouettes", 32, channels=1, max_images=512, progress=False).pixels
images = TensorDataset(normalise(torch.from_numpy(pixels[:]).permute(0, 3, 1, 2)))
sampler = DistributedSampler(images, seed=0)  # one order for all ranks; each takes its part
loader = DataLoader(images, batch_size=64 // world_size, sampler=sampler)

g = DistributedDataParallel(Generator(32, 1, 100, 32))  # starts from rank 0's weights
d = DistributedDataParallel(Discriminator(32, 1, 32))
optimizer_g = torch.optim.Adam(g.parameters(), lr=0.0002, betas=(0.5, 0.999))
optimizer_d = torch.optim.Adam(d.parameters(), lr=0.0002, betas=(0.5, 0.999))


def loss_against(scores: torch.Tensor, label: float) -> torch.Tensor:
    return cross_entropy(scores, torch.full_like(scores, label))


torch.manual_seed(1 + rank)  # from here on, each rank draws latent vectors of its own
for epoch in range(2):
    sampler.set_epoch(epoch)  # forget it, and every epoch has the order of the first
    for (real,) in loader:
        fake = g(torch.randn(len(real), 100))
        optimizer_d.zero_grad()
        loss_against(d(real), 0.5).backward()
        loss_against(d(fake.detach()), 0.0).backward()  # the ranks exchange within backward()
        optimizer_d.step()
        optimizer_g.zero_grad()
        d.requires_grad_(False)
        loss_g = loss_against(d.module(fake), 0.5)
        loss_g.backward()
        optimizer_g.step()
        d.requires_grad_(True)

weights = weights_checksum(*(dict(network.named_parameters()) for network in (g, d)))
line = f"rank {rank} of {world_size}: loss_g {loss_g.item():.2f}, weights {weights[:16]}\n"
print(line, end="", flush=True)  # in one piece: the ranks write into the same output
dist.destroy_process_group()
