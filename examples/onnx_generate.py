"""Write a model as ONNX files and let onnxruntime continue a text: no torch is needed to run them."""

import tempfile

import torch

from gateloop_transformer import TransformerConfig
from gateloop_transformer.export import OnnxGenerator, export_onnx

torch.manual_seed(0)
# In its place: load_model("runs/demo").
model = TransformerConfig.recommended(dim=32, depth=1, context=256).build().eval()
prompt = torch.tensor([list(b"Once upon a time there was a model that left its home")])

with tempfile.TemporaryDirectory() as folder:
    description = export_onnx(model, folder, block=16, tokenizer="bytes")
    state = sum(torch.Size(part["shape"][1:]).numel() for part in description["state"])
    print(f"{', '.join(description['files'])}: a state of {state} numbers, whatever the length")
    generator = OnnxGenerator(folder)
    tokens = generator.generate(prompt.numpy(), 50)

same = torch.equal(torch.from_numpy(tokens), model.generate(prompt, 50, temperature=0))
print("the same tokens as in torch:", same)
assert same
