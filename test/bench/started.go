package main

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// starts counts the processes that others start. The kernel tells of each that
// ends (taskstats, Documentation/accounting/taskstats.rst), so that none is too
// short to be seen, as it would be by looking from time to time.
type starts struct {
	socket *nl.NetlinkSocket

	mu   sync.Mutex
	seen map[int]map[string]ran // parent, program
	lost bool                   // the kernel had more to tell than the socket holds
}

// ran is how often a program was started, and how long all of that lasted.
type ran struct {
	times  int
	lasted time.Duration
}

// newStarts fails where the kernel does not tell, or does not tell this user.
func newStarts() (*starts, error) {
	s, err := openStarts()
	if err != nil {
		return nil, fmt.Errorf("count processes by taskstats: %w", err)
	}
	// In a PID namespace the numbers are not those we know. (Go itself starts a
	// process before the first program, to see whether it can have a pidfd.)
	if err := exec.Command("/bin/true").Run(); err != nil {
		s.socket.Close()
		return nil, err
	}
	for deadline := time.Now().Add(2 * time.Second); s.of(os.Getpid())["true"].times == 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			s.socket.Close()
			return nil, errors.New("count processes by taskstats: the kernel does not tell of ours")
		}
	}
	return s, nil
}

func openStarts() (*starts, error) {
	family, err := netlink.GenlFamilyGet(unix.TASKSTATS_GENL_NAME)
	if err != nil {
		return nil, err
	}
	cpus, err := os.ReadFile("/sys/devices/system/cpu/possible")
	if err != nil {
		return nil, err
	}
	s := &starts{seen: map[int]map[string]ran{}}
	if s.socket, err = nl.Subscribe(unix.NETLINK_GENERIC); err != nil {
		return nil, err
	}
	_ = s.socket.SetReceiveBufferSize(1<<22, true) // an overflow is noticed
	req := nl.NewNetlinkRequest(int(family.ID), 0)
	req.AddData(&nl.Genlmsg{Command: unix.TASKSTATS_CMD_GET, Version: unix.TASKSTATS_GENL_VERSION})
	req.AddData(nl.NewRtAttr(unix.TASKSTATS_CMD_ATTR_REGISTER_CPUMASK, nl.ZeroTerminated(strings.TrimSpace(string(cpus)))))
	if err := s.socket.Send(req); err != nil {
		s.socket.Close()
		return nil, err
	}
	go s.run()
	return s, nil
}

// run reads until the socket is closed.
func (s *starts) run() {
	for {
		messages, _, err := s.socket.Receive()
		switch {
		case errors.Is(err, unix.ENOBUFS):
			s.mu.Lock()
			s.lost = true
			s.mu.Unlock()
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN):
		case err != nil:
			return
		}
		for _, m := range messages {
			s.note(m)
		}
	}
}

func (s *starts) note(m syscall.NetlinkMessage) {
	if len(m.Data) < nl.SizeofGenlmsg || m.Data[0] != unix.TASKSTATS_CMD_NEW {
		return
	}
	attrs, err := nl.ParseRouteAttr(m.Data[nl.SizeofGenlmsg:])
	if err != nil {
		return
	}
	for _, a := range attrs {
		if a.Attr.Type&nl.NLA_TYPE_MASK != unix.TASKSTATS_TYPE_AGGR_PID {
			continue
		}
		nested, err := nl.ParseRouteAttr(a.Value)
		if err != nil {
			continue
		}
		for _, n := range nested {
			if n.Attr.Type&nl.NLA_TYPE_MASK != unix.TASKSTATS_TYPE_STATS {
				continue
			}
			if parent, program, lasted, ok := parseTaskstats(n.Value); ok {
				s.mu.Lock()
				if s.seen[parent] == nil {
					s.seen[parent] = map[string]ran{}
				}
				r := s.seen[parent][program]
				s.seen[parent][program] = ran{r.times + 1, r.lasted + lasted}
				s.mu.Unlock()
			}
		}
	}
}

// withTgid is the first version that tells processes from threads (Linux 5.19).
const withTgid = 12

// parseTaskstats returns the parent and the name of a process, and the time from
// its start to its end; not ok for a thread of one.
func parseTaskstats(data []byte) (parent int, program string, lasted time.Duration, ok bool) {
	var t unix.Taskstats
	// A kernel's may be shorter than ours, or longer: fields are only ever added.
	copy(unsafe.Slice((*byte)(unsafe.Pointer(&t)), unsafe.Sizeof(t)), data)
	if t.Version < withTgid || t.Ac_pid != t.Ac_tgid {
		return 0, "", 0, false
	}
	for _, c := range t.Ac_comm {
		if c == 0 {
			break
		}
		program += string(rune(byte(c)))
	}
	return int(t.Ac_ppid), program, time.Duration(t.Ac_etime) * time.Microsecond, true
}

// of returns which programs a process has started that have ended by now.
func (s *starts) of(parent int) map[string]ran {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.seen[parent])
}

// since says what has come since an earlier count.
func since(before, now map[string]ran) (n int, what string) {
	var parts []string
	for _, program := range slices.Sorted(maps.Keys(now)) {
		if k := now[program].times - before[program].times; k > 0 {
			n += k
			parts = append(parts, fmt.Sprintf("%s %d (%.1f s)", program, k, (now[program].lasted-before[program].lasted).Seconds()))
		}
	}
	return n, strings.Join(parts, ", ")
}
