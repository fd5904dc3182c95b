"""Ten lines to copy: a ResNet of torchvision, trained and served with fastres."""

import torch
from torchvision.models import resnet50

import fastres

model = fastres.fuse(resnet50().to(memory_format=torch.channels_last))
optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
images = torch.randn(2, 3, 224, 224).to(memory_format=torch.channels_last)
loss = torch.nn.functional.cross_entropy(model(images), torch.tensor([3, 7]))
loss.backward()
optimizer.step()

fastres.fuse(model.eval(), fold=True)  # the weights stay now: fold BN into the convolutions
with torch.inference_mode():
    print(model(images).softmax(1).max(1))
print(fastres.report(model))
