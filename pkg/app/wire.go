package app

import (
	"context"
	"errors"
	"net/netip"
	"time"

	"github.com/sluice-proxy/sluice/pkg/config"
	"github.com/sluice-proxy/sluice/pkg/model"
	"github.com/sluice-proxy/sluice/pkg/plan"
	"github.com/sluice-proxy/sluice/proxier"
	"github.com/sluice-proxy/sluice/proxier/iptables"
)

// What package ipvs is going to offer, for as long as it does not.

type ipvsHost struct {
	Programs    iptables.Programs
	Why         string
	RandomFully bool
	Schedulers  []string
	Version     string
	Missing     []string
}

type ipvsOptions struct {
	Family        model.Family
	Programs      iptables.Programs
	MasqueradeBit int
	RandomFully   bool
	Detector      proxier.Detector
	Scheduler     string
	Schedulers    []string
	Exclude       []netip.Prefix
	Drain         func() time.Duration
	Report        proxier.Reporter
	Stats         iptables.Stats
}

type ipvsDraining struct {
	Server           string
	Endpoint         netip.AddrPort
	Since, Until     time.Time
	Active, Inactive int
}

var errNotYet = errors.New("this version of Sluice has no ipvs mode")

func systemIPVS() ipvsKernel {
	return ipvsKernel{
		probe:          func(context.Context, model.Family, string) (ipvsHost, error) { return ipvsHost{}, errNotYet },
		open:           func(ipvsOptions) (ipvsProxier, error) { return nil, errNotYet },
		checkScheduler: func(string, []string) error { return nil },
		setTimeouts:    func(_, _, _ time.Duration) error { return errNotYet },
		removeOther:    func(context.Context, model.Family) (bool, error) { return false, nil },
		cleanup:        func(context.Context, model.Family) error { return nil },
	}
}

func ipvsRender(*plan.Set, ipvsOptions, model.ServiceName) string { return "" }

func drainOf(*config.Config) time.Duration { return 0 }
