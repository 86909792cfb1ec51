# Everything, with CUDA operators: docker build -t vision-rwkv . && docker run --gpus all --ipc=host --rm -it vision-rwkv
# The toolkit's version is that of PyTorch's CUDA (requirements/torch.txt).
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

# libgl1 and libglib are OpenCV's.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential libgl1 libglib2.0-0t64 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

# No GPU is in sight of a build: say what to compile for, and that CUDA code is wanted (FORCE_CUDA: mmcv's).
ENV TORCH_CUDA_ARCH_LIST="8.0;8.6;8.9;9.0;12.0+PTX" \
    FORCE_CUDA=1 \
    VISION_RWKV_CUDA=1 \
    PIP_NO_CACHE_DIR=1

WORKDIR /vision-rwkv

# What changes least comes first: PyTorch, OpenMMLab and mmcv's operators, half an hour, are built once.
COPY Makefile ./
COPY requirements requirements
COPY tools/install_mmcv.sh tools/
RUN make .venv/.all && rm -rf /root/.cache

COPY . .
RUN make install

ENV PATH=/vision-rwkv/.venv/bin:$PATH
CMD ["bash"]
