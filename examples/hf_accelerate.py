import sys, torch
from accelerate import Accelerator, DataLoaderConfiguration
from transformers import MixtralConfig, MixtralForCausalLM, get_linear_schedule_with_warmup
from moesaic import shard_experts
from moesaic.transformers import attach

accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, dataloader_config=DataLoaderConfiguration(split_batches=True))
torch.manual_seed(0)
sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
model = MixtralForCausalLM(MixtralConfig(vocab_size=64, num_local_experts=4, **sizes))
handle = shard_experts(model, mesh=torch.distributed.init_device_mesh("cpu", (accelerator.num_processes,)))
optimizer = torch.optim.AdamW(handle.parameter_groups(), lr=1e-2)
schedule = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=2, num_training_steps=20)
loader = torch.utils.data.DataLoader(1 + (torch.arange(160)[:, None] + 5 * torch.arange(16)) % 63, batch_size=4)
model, optimizer, loader, schedule = attach(accelerator, handle).prepare(model, optimizer, loader, schedule)
if sys.argv[1:]:
    accelerator.load_state(sys.argv[1])
for ids in accelerator.skip_first_batches(loader, 2 * schedule.scheduler.last_epoch):
    with accelerator.accumulate(model):
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        accelerator.print(f"loss {accelerator.reduce(loss.detach(), 'mean'):.6f}")
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), max_norm=0.5)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    if accelerator.sync_gradients and schedule.scheduler.last_epoch == 10:
        accelerator.save_state("runs/accelerate/checkpoint-10")
accelerator.save_model(model, "runs/accelerate/model")
