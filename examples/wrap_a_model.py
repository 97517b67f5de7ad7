import torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from moesaic import MoELayer, shard_experts

dist.init_process_group("gloo")
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(32, 64), MoELayer(64, 128, num_experts=8, top_k=2), nn.Linear(64, 1))
handle = shard_experts(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
optimizer = torch.optim.AdamW(handle.parameter_groups(), lr=1e-3)
torch.manual_seed(dist.get_rank())
for step in range(100):
    x = torch.randn(256, 32)
    loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
    (loss + handle.aux_loss()).backward()
    handle.clip_grad_norm_(1.0)
    optimizer.step()
    optimizer.zero_grad()
    handle.step()
    if dist.get_rank() == 0 and step % 20 == 19:
        print(step + 1, f"loss {loss.item():.3f}", f"busiest rank {handle.metrics()['max_over_mean']:.3f} of the mean")
dist.destroy_process_group()
