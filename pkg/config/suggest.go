package config

import "strings"

// suggest finds the field that the author of an unknown one most likely meant:
// one that is spelt much alike, or is spelt the same and lives elsewhere. It
// returns "" rather than a wild guess.
func suggest(unknown string, known []string) string {
	best, bestCost := "", 1000
	name := lastElement(unknown)
	if len(name) < 3 {
		return ""
	}
	for _, candidate := range known {
		cost := 2 * distance(strings.ToLower(name), strings.ToLower(lastElement(candidate)))
		if cost > max(2, len(name)/2) || cost > 6 {
			continue
		}
		if parent(candidate) != parent(unknown) {
			cost++
		}
		if cost < bestCost {
			best, bestCost = candidate, cost
		}
	}
	return best
}

func lastElement(path string) string { return path[strings.LastIndexByte(path, '.')+1:] }

func parent(path string) string { return path[:max(0, strings.LastIndexByte(path, '.'))] }

// distance is the number of letters to add, drop or change that makes a of b
// (Levenshtein). Long texts count as entirely different: nobody misspells those.
func distance(a, b string) int {
	if max(len(a), len(b)) > 64 {
		return max(len(a), len(b))
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			change := diagonal
			if a[i] != b[j] {
				change++
			}
			diagonal = row[j+1]
			row[j+1] = min(change, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}
