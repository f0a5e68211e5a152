# One file, four images: `api` and `predictor` have no torch in them, `worker-cpu` and `worker-cuda` have.
# Packages come from the locks, by hash; from where they are downloaded is the build host's own setting.
ARG PYTHON_VERSION=3.12

FROM python:${PYTHON_VERSION}-slim AS wheel
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY core ./core
COPY ml ./ml
COPY server ./server
COPY workers ./workers
COPY cli ./cli
COPY migrations ./migrations
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:${PYTHON_VERSION}-slim AS base
ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    NOISY_STUDENT_DATA_DIRECTORY=/data \
    NOISY_STUDENT_DATASET_ROOTS=/datasets
# A fixed number, so that a host folder can be given to the same owner.
RUN groupadd --gid 10001 noisy-student \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /data noisy-student \
 && install -d -o noisy-student -g noisy-student /data /datasets
# Empty and not writable: nothing in it can stand in for a module.
WORKDIR /app
VOLUME /data

FROM base AS web
COPY requirements/api.txt /tmp/requirements.txt
RUN pip install --require-hashes -r /tmp/requirements.txt
COPY --from=wheel /wheels /tmp/wheels
RUN pip install --no-deps /tmp/wheels/*.whl
ENV NOISY_STUDENT_HOST=0.0.0.0
USER noisy-student

FROM web AS api
ENV NOISY_STUDENT_PORT=8000
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
CMD ["python", "-m", "server"]

FROM web AS predictor
ENV NOISY_STUDENT_PORT=8001
EXPOSE 8001
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8001/readyz', timeout=4)"]
CMD ["python", "-m", "server", "--predictor"]

FROM base AS worker
COPY requirements/worker.txt /tmp/requirements.txt
RUN pip install --require-hashes -r /tmp/requirements.txt
COPY --from=wheel /wheels /tmp/wheels
RUN pip install --no-deps /tmp/wheels/*.whl
USER noisy-student
HEALTHCHECK --interval=15s --timeout=10s --start-period=60s --retries=3 \
    CMD ["python", "-m", "workers.health"]

FROM worker AS worker-cpu
CMD ["celery", "-A", "workers.app", "worker", "-Q", "cpu"]

FROM worker AS worker-cuda
# What the NVIDIA container toolkit lends to the container.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
CMD ["celery", "-A", "workers.app", "worker", "-Q", "cuda"]
