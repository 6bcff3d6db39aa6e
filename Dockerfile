# One image per service: docker build --build-arg SERVICE=credits -t framewire-credits .
# SERVICE: gateway, credits, generator, storage or simulator. `docker run ... migrate` brings its database up.
# Only syntax that the classic builder understands too. PyAV's wheel (storage, simulator) bundles GPL x264/x265:
# whoever hands those images on must heed that.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ARG SERVICE
RUN test -n "$SERVICE" || (echo "which one? --build-arg SERVICE=gateway|credits|generator|storage|simulator" >&2 && exit 1)
# The venv gets no pip of its own: the builder's installs into it. Wheels only, each by its hash.
RUN python -m venv --without-pip /opt/venv
COPY requirements/${SERVICE}.txt /requirements.txt
RUN python -m pip --python /opt/venv/bin/python install --disable-pip-version-check --no-cache-dir --no-compile \
      --require-hashes --only-binary :all: -r /requirements.txt
WORKDIR /app
COPY framewire framewire
COPY kit kit
COPY services/__init__.py services/__init__.py
COPY services/${SERVICE} services/${SERVICE}
COPY deploy/compose/healthy.py deploy/compose/set_up_bus.py deploy/compose/front.py ./
# Compiled here, for nothing is ever written there again.
RUN /opt/venv/bin/python -m compileall -q --invalidation-mode unchecked-hash /opt/venv/lib /app

FROM ${PYTHON_IMAGE}
ARG SERVICE
LABEL org.opencontainers.image.title="framewire-${SERVICE}" org.opencontainers.image.licenses="Apache-2.0"
# No installer is left to whoever gets in. The one writable place, for a volume to be mounted on.
RUN find / -xdev \( -path '*-packages/pip' -o -path '*-packages/pip-*' -o -path '*-packages/setuptools*' \
      -o -path '*-packages/wheel*' -o -path '*-packages/pkg_resources' -o -path '*-packages/*distutils*' \
      -o -path '*/ensurepip' -o -path '*/share/python-wheels' \) -prune -exec rm -rf {} + \
 && rm -f /usr/bin/pip* /usr/local/bin/pip* /usr/local/bin/wheel \
 && mkdir /var/lib/framewire && chown 10001:10001 /var/lib/framewire
COPY --from=build /opt/venv /opt/venv
COPY --from=build /app /app
ENV PATH=/opt/venv/bin:/usr/local/bin:/usr/bin:/bin \
    FRAMEWIRE_SERVICE=${SERVICE} \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
WORKDIR /app
USER 10001:10001
ENTRYPOINT ["sh", "-c", "exec python -m services.$FRAMEWIRE_SERVICE \"$@\"", "framewire"]
