"""Where OpenVINO's int8 spends its time: milliseconds an image, by kind of layer and the kernel that runs it.

python benchmarks/int8_profile.py [PICTURES]
"""

import sys
from collections import Counter

import openvino
import torch

from vggenc import Options, VGG19Encoder
from vggenc.engines import Engine
from vggenc.images import decode
from vggenc.inputs import find_images
from vggenc.stages import STAGE_NAMES

ROUNDS = 5

compile_model = openvino.Core.compile_model


def profiled(self, model, device_name="CPU", config=None):
    return compile_model(self, model, device_name, {**(config or {}), "PERF_COUNT": "YES"})


openvino.Core.compile_model = profiled
images = find_images(sys.argv[1:] or ["examples/images"])
encoder = VGG19Encoder(1, weights="OXFORD_V1")
pixels = torch.stack(
    [encoder.preprocess.square(decode(images.file(i))) for i in range(min(8, len(images.paths)))]
)
for precision in ("fp32", "int8"):
    engine = Engine(encoder, STAGE_NAMES, Options(engine="openvino", precision=precision))
    engine.prepare(list(pixels.split(1)))
    request = engine.trunk._run.create_infer_request()
    batch = engine.preprocess.normalize(pixels).numpy()
    spent = Counter()
    for turn in range(ROUNDS + 1):
        request.infer(batch)
        if turn:
            for layer in request.profiling_info:
                seconds = layer.real_time.total_seconds()
                spent[layer.node_type, layer.exec_type] += 1000 * seconds / ROUNDS / len(pixels)
    print(f"{precision}: {sum(spent.values()):.1f} ms an image")
    for (kind, kernel), value in spent.most_common(5):
        print(f"  {value:7.1f}  {kind:20} {kernel}")
