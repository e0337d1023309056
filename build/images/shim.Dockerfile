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
COPY tools/__init__.py tools/command.py /app/tools/
COPY tools/shim /app/tools/shim
WORKDIR /app
ENV PATH=/opt/venv/bin:${PATH} HOME=/tmp PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 10001:10001
EXPOSE 8101 8102
HEALTHCHECK --interval=3s --timeout=15s --start-period=10m --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8101/health', timeout=14)"]
ENTRYPOINT ["python", "-m", "tools.shim", "--host", "0.0.0.0"]
