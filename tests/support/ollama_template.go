// Fills a Modelfile's template in with Go's own text/template, as Ollama does: reads {"template", "conversations":
// [[{"Role", "Content"}]]} from standard input, writes the texts as a JSON array.
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type message struct{ Role, Content string }

func main() {
	var asked struct {
		Template      string
		Conversations [][]message
	}
	if err := json.NewDecoder(os.Stdin).Decode(&asked); err != nil {
		panic(err)
	}
	parsed := template.Must(template.New("").Option("missingkey=zero").Parse(asked.Template))
	texts := []string{}
	for _, messages := range asked.Conversations {
		var system []string
		pointers := []*message{}
		for i := range messages {
			if messages[i].Role == "system" {
				system = append(system, messages[i].Content)
			}
			pointers = append(pointers, &messages[i])
		}
		var text strings.Builder
		values := map[string]any{"System": strings.Join(system, "\n\n"), "Messages": pointers, "Response": "", "Think": false}
		if err := parsed.Execute(&text, values); err != nil {
			panic(err)
		}
		texts = append(texts, text.String())
	}
	if err := json.NewEncoder(os.Stdout).Encode(texts); err != nil {
		panic(err)
	}
}
