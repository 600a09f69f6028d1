// The command line: see options.h.
#include "options.h"
#include "../kernels/fail.h"
#include <cjson/cJSON.h>
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

typedef enum { TEXT, INT, REAL, FLAG, CHOICE, FILES } OptionKind;
typedef struct {
    const char *group, *name;
    OptionKind kind;
    const char *value, *choices, *help;
    size_t at;
} Option;
#define OPTION_GROUP(title) { title, 0, TEXT, 0, 0, 0, 0 },
#define OPTION_ROW(field, name, kind, value, choices, help) \
    { 0, name, kind, value, choices, help, offsetof(Options, field) },
static const Option table[] = { OPTION_TABLE(OPTION_GROUP, OPTION_ROW) };
enum { ROWS = (int)(sizeof table / sizeof table[0]) };

// Edit distance, for "did you mean".
static int distance(const char *a, const char *b) {
    int n = (int)strlen(b), row[64];
    if (n > 62) return 99;
    for (int j = 0; j <= n; j++) row[j] = j;
    for (int i = 1; a[i - 1]; i++) {
        int diagonal = row[0];
        row[0] = i;
        for (int j = 1; j <= n; j++) {
            int up = row[j], best = diagonal + (a[i - 1] != b[j - 1]);
            if (up + 1 < best) best = up + 1;
            if (row[j - 1] + 1 < best) best = row[j - 1] + 1;
            diagonal = up;
            row[j] = best;
        }
    }
    return row[n];
}

static const Option *find(const char *name) {
    const Option *near = 0;
    int best = 99;
    for (int i = 0; i < ROWS; i++) {
        if (!table[i].name) continue;
        if (!strcmp(table[i].name, name)) return &table[i];
        int d = distance(name, table[i].name);
        if (d < best) {
            best = d;
            near = &table[i];
        }
    }
    if (best <= 3) die("unknown option --%s|did you mean --%s? --help lists all", name, near->name);
    die("unknown option --%s|--help lists all", name);
}

double options_real(const char *name, const char *value) {
    char *end;
    double x = strtod(value, &end);
    if (!*value || *end || !isfinite(x))
        die("--%s %s is not a number|give a number such as 0.1 or 3e-4", name, value);
    return x;
}

static int64_t parse_int(const char *name, const char *value) {
    char *end;
    errno = 0;
    long long x = strtoll(value, &end, 10);
    if (!*value || *end || errno)
        die("--%s %s is not a whole number|give a number such as 64", name, value);
    return x;
}

int64_t options_count(const char *name, const char *value, int64_t total) {
    if (!strpbrk(value, ".eE")) return parse_int(name, value);
    double ratio = options_real(name, value);
    if (ratio < 0 || ratio > 1)
        die("--%s %s: a ratio lies between 0 and 1|write a count without a point, or a ratio of --steps",
            name, value);
    return (int64_t)ceil(
        ratio *
        (double)total); // as transformers, 0.07 of 100 is 8: the product in double is just above 7
}

// The choices for a hint: "a, b, c" (a bar would end the message there). Lives until the next call.
static const char *choices_text(const Option *o) {
    static char text[256];
    size_t n = 0;
    for (const char *p = *o->choices ? o->choices : "a number"; *p && n + 3 < sizeof text; p++) {
        if (*p == '|') text[n++] = ',';
        text[n++] = *p == '|' ? ' ' : *p;
    }
    text[n] = 0;
    return text;
}

static int parse_choice(const Option *o, const char *value) {
    int i = 0;
    for (const char *p = o->choices;; i++) {
        size_t n = strcspn(p, "|");
        if (n == strlen(value) && !strncmp(p, value, n)) return i;
        if (!p[n]) break;
        p += n + 1;
    }
    die("--%s %s is not a choice|choose one of %s", o->name, value, choices_text(o));
}

static void set(Options *options, const Option *o, const char *value) {
    char *field = (char *)options + o->at;
    switch (o->kind) {
    case TEXT: *(const char **)field = value; break;
    case INT: *(int64_t *)field = parse_int(o->name, value); break;
    case REAL: *(double *)field = options_real(o->name, value); break;
    case FLAG: *(int *)field = !strcmp(value, "on"); break;
    case CHOICE: *(int *)field = parse_choice(o, value); break;
    case FILES: break;
    }
}

Options options_parse(int argc, char **argv) {
    Options options;
    memset(&options, 0, sizeof options);
    for (int i = 0; i < ROWS; i++)
        if (table[i].name) set(&options, &table[i], table[i].value);
    for (int i = 1; i < argc;) {
        if (!strcmp(argv[i], "-h")) {
            options.help = 1;
            i++;
            continue;
        }
        if (strncmp(argv[i], "--", 2))
            die("%s is not an option|options begin with --; --help lists all", argv[i]);
        const char *equals = strchr(argv[i], '=');
        char name[64];
        snprintf(name, sizeof name, "%.*s", equals ? (int)(equals - argv[i] - 2) : 60, argv[i] + 2);
        const Option *o = find(name);
        const char *next = equals ? equals + 1 : i + 1 < argc ? argv[i + 1] : 0;
        i++;
        if (o->kind == FLAG) {
            int given = next && (!strcmp(next, "on") || !strcmp(next, "off"));
            if (equals && !given)
                die("--%s=%s|this option stands alone, or takes on or off", o->name, next);
            set(&options, o, given ? next : "on");
            i += given && !equals;
        } else if (o->kind == FILES) {
            FileList *list = (FileList *)((char *)&options + o->at);
            int first = equals ? i - 1 : i, end = first;
            while (end < argc && (end == first ? equals || strncmp(argv[end], "--", 2)
                                               : strncmp(argv[end], "--", 2)))
                end++;
            if (end == first) die("--%s needs a value|%s", o->name, choices_text(o));
            list->name = (const char **)realloc((void *)list->name,
                                                (size_t)(list->n + end - first) * sizeof(char *));
            if (!list->name) die("out of host memory for --%s|free memory", o->name);
            for (int k = first; k < end; k++)
                list->name[list->n++] = k == first && equals ? next : argv[k];
            i = end;
        } else {
            if (!next || (!equals && !strncmp(next, "--", 2)))
                die("--%s needs a value|%s", o->name, choices_text(o));
            set(&options, o, next);
            i += !equals;
        }
    }
    return options;
}

void options_help(FILE *out) {
    fprintf(
        out,
        "train_moe: trains Qwen3-MoE, every parameter.\n\n  ./train_moe --init model/configs/tiny.json --train text.txt --steps 200 --out runs/first\n"
        "  mpirun -np 4 ./train_moe --model DIR --train 'shards/*.bin' --ep 2 --fsdp 2 --out runs/second\n");
    for (int i = 0; i < ROWS; i++) {
        const Option *o = &table[i];
        if (!o->name) {
            fprintf(out, "\n%s\n", o->group);
            continue;
        }
        char left[96];
        snprintf(left, sizeof left, "--%s %s", o->name, o->choices);
        fprintf(out, "  %-46s %s%s%s%s%s\n", left, o->help, *o->help && *o->value ? " " : "",
                *o->value ? "[" : "", o->value, *o->value ? "]" : "");
    }
}

const char *options_choice(const Options *options, const char *name) {
    static char word[32];
    const Option *o = find(name);
    const char *p = o->choices;
    for (int k = *(const int *)((const char *)options + o->at); k > 0; k--)
        p += strcspn(p, "|") + 1;
    snprintf(word, sizeof word, "%.*s", (int)strcspn(p, "|"), p);
    return word;
}

struct cJSON *options_json(const Options *options) {
    cJSON *json = cJSON_CreateObject();
    for (int i = 0; i < ROWS; i++) {
        const Option *o = &table[i];
        if (!o->name || !strcmp(o->name, "help")) continue;
        const char *field = (const char *)options + o->at;
        if (o->kind == TEXT)
            cJSON_AddStringToObject(json, o->name, *(const char *const *)field);
        else if (o->kind == INT)
            cJSON_AddNumberToObject(json, o->name, (double)*(const int64_t *)field);
        else if (o->kind == REAL)
            cJSON_AddNumberToObject(json, o->name, *(const double *)field);
        else if (o->kind == FLAG)
            cJSON_AddBoolToObject(json, o->name, *(const int *)field);
        else if (o->kind == FILES) {
            const FileList *list = (const FileList *)field;
            cJSON *array = cJSON_AddArrayToObject(json, o->name);
            for (int k = 0; k < list->n; k++)
                cJSON_AddItemToArray(array, cJSON_CreateString(list->name[k]));
        } else
            cJSON_AddStringToObject(json, o->name, options_choice(options, o->name));
    }
    return json;
}
