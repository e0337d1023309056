# The gateway, alone. BASE is the one of triton-cpu.
ARG BASE
FROM ${BASE} AS packages
ARG PIP_INDEX_URL
COPY build/images/shim.lock /
RUN python3 -m venv /opt/venv \
    && /opt/venv/bin/python -m pip install --no-cache-dir --no-deps --require-hashes -r /shim.lock \
    && /opt/venv/bin/python -m pip uninstall --yes --quiet setuptools pip

FROM ${BASE}
COPY --from=packages /opt/venv /opt/venv
COPY build/__init__.py build/config.py build/errors.py build/gpu.py build/memory.py build/tasks.py /app/build/
COPY tools/__init__.py tools/access.py tools/command.py tools/direct.py tools/option_types.py tools/ports.py \
    tools/repository.py /app/tools/
COPY tools/shim /app/tools/shim
WORKDIR /app
ENV PATH=/opt/venv/bin:${PATH} HOME=/tmp PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 10001:10001
EXPOSE 8101 8102
# Every few seconds for ever: without urllib it takes 20 ms of a processor instead of 90.
HEALTHCHECK --interval=3s --timeout=15s --start-period=10m --retries=3 CMD ["python", "-ISc", "import socket; \
    s = socket.create_connection(('127.0.0.1', 8101), 14); s.sendall(b'GET /health HTTP/1.0\\r\\n\\r\\n'); \
    assert b' 200 ' in s.recv(64)"]
ENTRYPOINT ["python", "-m", "tools.shim", "--host", "0.0.0.0"]
