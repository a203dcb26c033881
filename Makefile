# `make` alone prints what there is. The work is in hack/; a target is one line or two.

# Programs in sbin are not on a plain user's PATH in Debian; Go's own place is
# not on everybody's.
export PATH := $(PATH):/usr/sbin:/sbin:/usr/local/go/bin

MODE     ?= iptables
# The nearest tag, or the commit before there is any; always vX.Y.Z first, which
# component-base insists on.
VERSION  ?= $(shell git describe --tags --match 'v[0-9]*' --dirty 2>/dev/null || \
	echo v0.1.0-g$$(git describe --always --dirty --exclude '*' 2>/dev/null || echo unknown))
FUZZTIME ?= 30s
LDFLAGS   = -s -w -X k8s.io/component-base/version.gitVersion=$(VERSION)

.DEFAULT_GOAL := help
.PHONY: help build test e2e demo bench fuzz lint image clean

help: ## print this
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: ## build bin/sluice
	@hack/install.sh build
	CGO_ENABLED=0 go build -trimpath -ldflags '$(LDFLAGS)' -o bin/sluice ./cmd/sluice

test: ## install what is missing, build the tools, run every test (30 minutes at the most on a fresh machine)
	@hack/install.sh
	@hack/tools.sh etcd kube-apiserver
	@hack/test.sh ./...

e2e: ## only the tests against a real API server
	@hack/install.sh
	@hack/tools.sh etcd kube-apiserver
	@hack/test.sh -count=1 ./test/e2e/

demo: build ## show the agent at work in namespaces of its own (MODE=iptables, ipvs or nftables)
	@hack/install.sh
	@hack/demo.sh $(MODE)

bench: build ## measure against kube-proxy, side by side (MODE=iptables, ipvs or nftables)
	@hack/install.sh
	@hack/tools.sh kube-proxy
	@hack/bench.sh $(MODE)

fuzz: ## run every fuzzer for FUZZTIME (30s)
	@hack/fuzz.sh $(FUZZTIME)

lint: ## gofmt, go vet and staticcheck (pinned in hack/tools/lint)
	@hack/lint.sh

image: build ## build the container image with buildah
	@hack/install.sh image
	@hack/image.sh sluice-proxy/sluice:$(VERSION)

clean: ## remove what the build made
	rm -rf bin out
