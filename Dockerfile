# The image of the agent. hack/image.sh builds it with buildah; docker build and
# podman build work as well. BASE must be a Debian (or have iptables' both variants).
ARG BASE=docker.io/library/debian:bookworm-slim

FROM docker.io/library/golang:1.26-bookworm AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY . .
ARG VERSION=v0.1.0-gunknown
RUN CGO_ENABLED=0 go build -trimpath -buildvcs=false \
    -ldflags "-s -w -X k8s.io/component-base/version.gitVersion=${VERSION}" \
    -o /sluice ./cmd/sluice

FROM ${BASE}
# Debian's package has the legacy and the nft variant; the agent finds out which of
# them the node uses and calls that one by name. kmod: iptables asks for modprobe.
RUN apt-get update \
    && apt-get install -y --no-install-recommends iptables kmod \
    && rm -rf /var/lib/apt/lists/* /var/cache/* /var/log/* /usr/share/doc /usr/share/man /usr/share/locale
COPY LICENSE /usr/share/licenses/sluice/LICENSE
COPY --from=build /sluice /usr/bin/sluice
ENTRYPOINT ["/usr/bin/sluice"]
