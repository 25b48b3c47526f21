"""Feed a layer one sample at a time: the state carries everything it remembers."""

import torch

from gateloop_transformer import GateLoopedAttention, load_state, save_state

layer = GateLoopedAttention(dim=32, heads=8, gate="ring", conv_size=4).eval()
signal = torch.randn(1, 200, 32)

state, outputs = None, []
with torch.no_grad():
    for sample in signal.split(1, dim=1):
        y, state = layer(sample, state, return_state=True)
        outputs.append(y)
    whole = layer(signal)
print("largest difference to the whole:", (torch.cat(outputs, 1) - whole).abs().max().item())

save_state(state, "stream.safetensors")
print("state saved and loaded:", torch.equal(load_state("stream.safetensors").real, state.real))
