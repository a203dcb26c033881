package ipvs

import (
	"strconv"

	"github.com/sluice-proxy/sluice/pkg/model"
)

// rules is a chain with its complete content, as iptables-save prints it.
type rules struct {
	table, chain string
	content      []string // the text behind "-A CHAIN "
}

// jump is a rule of a built-in chain that leads into one of ours. Jumps are put
// at the top of their chains in the given order, so that later ones end up above
// earlier ones.
type jump struct {
	table, from string
	text        string
}

// static is all that is not changed by Services: chains and jumps of one family.
type static struct {
	family model.Family
	chains []rules
	jumps  []jump
}

var _ = strconv.Itoa
