# The Triton of `make serve`, alone: the wheel's tritonserver, its Python backend, tokenizers and OpenVINO.
# BASE is any Debian 12 or newer with a Python from 3.10 to 3.13, its venv module and libpython. EXTRAS are the locks of
# what else is to be served: chat, documents or both.
ARG BASE
FROM ${BASE} AS packages
ARG PIP_INDEX_URL
COPY build/images/triton-cpu.lock /
RUN python3 -m venv /opt/venv \
    && /opt/venv/bin/python -m pip install --no-cache-dir --no-deps --require-hashes -r /triton-cpu.lock \
    # 60 MB for devices that this image does not serve.
    && rm -f /opt/venv/lib/python3*/site-packages/openvino/libs/libopenvino_intel_gpu_plugin.so \
        /opt/venv/lib/python3*/site-packages/openvino/libs/libopenvino_intel_npu_plugin.so \
        /opt/venv/lib/python3*/site-packages/openvino/libs/cache.json
ARG EXTRAS
COPY chat.lock documents.lock /
RUN for extra in ${EXTRAS}; do /opt/venv/bin/python -m pip install --no-cache-dir --no-deps --require-hashes \
        -r "/${extra}.lock" || exit 1; done \
    && /opt/venv/bin/python -m pip uninstall --yes --quiet setuptools pip

FROM ${BASE}
COPY --from=packages /opt/venv /opt/venv
COPY build/__init__.py build/config.py build/errors.py build/gpu.py /app/build/
COPY tools /app/tools
WORKDIR /app
# Triton and OpenVINO look for a home; this user has none, and nothing but /tmp can be written.
ENV PATH=/opt/venv/bin:${PATH} HOME=/tmp PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 10001:10001
EXPOSE 8200 8201 8202
# Every few seconds for ever: without urllib it takes 20 ms of a processor instead of 90.
HEALTHCHECK --interval=3s --timeout=5s --start-period=10m --retries=3 CMD ["python", "-ISc", "import socket; \
    s = socket.create_connection(('127.0.0.1', 8200), 4); s.sendall(b'GET /v2/health/ready HTTP/1.0\\r\\n\\r\\n'); \
    assert b' 200 ' in s.recv(64)"]
ENTRYPOINT ["python", "-m", "tools.triton", "--host", "0.0.0.0", "--repository", "/models", "--work-folder", "/tmp"]
