import sys, torch, torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from moesaic import shard_experts

dist.init_process_group("gloo")
torch.manual_seed(0)  # small and random here; from_pretrained(folder, dtype=torch.bfloat16) otherwise
sizes = dict(vocab_size=64, hidden_size=64, moe_intermediate_size=32, num_experts=8, num_experts_per_tok=2, num_hidden_layers=2)
heads = dict(num_attention_heads=4, num_key_value_heads=4, head_dim=16)
model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads)).to(torch.bfloat16)
experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], target_parameters=experts))
handle = shard_experts(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
optimizer = torch.optim.AdamW(handle.parameter_groups(), lr=1e-2)
torch.manual_seed(dist.get_rank())
for step in range(40):
    first = torch.randint(64, (16, 1))
    ids = (first + 5 * torch.arange(12)) % 64  # counting in fives
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    handle.step()
    if dist.get_rank() == 0 and step % 10 == 9:
        print(step + 1, f"loss {loss.item():.2f}")
handle.weights.save_adapter(sys.argv[1])  # for PeftModel.from_pretrained(base_model, folder)
dist.destroy_process_group()
