# NVIDIA's own Triton with what our steps import, started with the models whose TensorRT plans fit the GPU.
# BASE is nvcr.io/nvidia/tritonserver, 26.08 or newer.
ARG BASE
# An index may want a password, which the final image must not remember: what it gives is brought in a stage of its own.
FROM ${BASE} AS packages
ARG PIP_INDEX_URL
COPY build/images/triton-gpu.lock /
RUN python3 -m pip download --no-cache-dir --no-deps --require-hashes --dest /packages -r /triton-gpu.lock
# What compiles plans: TensorRT's libraries are there, its Python is not. Its own version, which the image names.
RUN if [ -n "${TRT_VERSION}" ]; then python3 -m pip download --no-cache-dir --no-deps --dest /tensorrt \
    "tensorrt-cu13-bindings==${TRT_VERSION%%+*}" || echo "no plans: install TensorRT ${TRT_VERSION} for Python"; fi; \
    mkdir -p /tensorrt

FROM ${BASE}
COPY build/images/triton-gpu.lock /
COPY --from=packages /packages /packages
COPY --from=packages /tensorrt /packages/tensorrt
# The Python backend's stub is built for the image's own Python, which Debian and Ubuntu guard against pip.
RUN python3 -m pip install --break-system-packages --no-cache-dir --no-deps --no-index --find-links /packages \
    --require-hashes -r /triton-gpu.lock
RUN if [ -n "$(ls /packages/tensorrt)" ]; then python3 -m pip install --break-system-packages --no-cache-dir --no-deps \
    --no-index /packages/tensorrt/*; fi
COPY build /app/build
COPY tools /app/tools
WORKDIR /app
ENV HOME=/tmp PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 10001:10001
EXPOSE 8200 8201 8202
# Every few seconds for ever: without urllib it takes 20 ms of a processor instead of 90.
HEALTHCHECK --interval=3s --timeout=5s --start-period=10m --retries=3 CMD ["python3", "-ISc", "import socket; \
    s = socket.create_connection(('127.0.0.1', 8200), 4); s.sendall(b'GET /v2/health/ready HTTP/1.0\\r\\n\\r\\n'); \
    assert b' 200 ' in s.recv(64)"]
ENTRYPOINT ["python3", "-m", "tools.tritonserver", "--host", "0.0.0.0", "--repository", "/models", "--work-folder", "/tmp"]
