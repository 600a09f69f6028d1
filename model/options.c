// The command line, from the table in options.h: parsing, checks of single values, help, JSON.
// Errors name the option; an unknown one is compared with all names for a suggestion.
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
    const char *value;
    double least, most;
    const char *choices, *help;
    size_t at;
} Option;
#define OPTION_GROUP(title) { title, 0, TEXT, 0, 0, 0, 0, 0, 0 },
#define OPTION_ROW(field, name, kind, value, least, most, choices, help) \
    { 0, name, kind, value, least, most, choices, help, offsetof(Options, field) },
static const Option table[] = { OPTION_TABLE(OPTION_GROUP, OPTION_ROW) };
enum { ROWS = (int)(sizeof table / sizeof table[0]) };

// Edit distance, for "did you mean".
static int distance(const char *a, const char *b) {
    int n = (int)strlen(b);
    int row[64];
    if (n > 62) return 99;
    for (int j = 0; j <= n; j++) row[j] = j;
    for (int i = 1; a[i - 1]; i++) {
        int diagonal = row[0];
        row[0] = i;
        for (int j = 1; j <= n; j++) {
            int up = row[j];
            int best = diagonal + (a[i - 1] != b[j - 1]);
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
        die("--%s %s is not a whole number|write a whole number such as 64", name, value);
    return x;
}

int64_t options_count(const char *name, const char *value, int64_t total) {
    size_t n = strlen(value);
    int percent = n > 1 && value[n - 1] == '%';
    if (!percent && !strpbrk(value, ".eE")) return parse_int(name, value);
    char number[64];
    snprintf(number, sizeof number, "%.*s", (int)(n - percent), value);
    double ratio = options_real(name, number) / (percent ? 100 : 1);
    if (ratio < 0 || ratio > 1)
        die("--%s %s: a ratio lies between 0 and 1|write a count without a point, or such a ratio",
            name, value);
    return (int64_t)ceil(
        ratio *
        (double)total); // as transformers, 0.07 of 100 is 8: the product in double is just above 7
}

static const char *takes(const Option *o) { return *o->choices ? o->choices : "a number"; }

static int parse_choice(const Option *o, const char *value) {
    int i = 0;
    for (const char *p = o->choices;; i++) {
        size_t n = strcspn(p, "|");
        if (n == strlen(value) && !strncmp(p, value, n)) return i;
        if (!p[n]) break;
        p += n + 1;
    }
    die("--%s %s is not a choice|choose one of %s", o->name, value, o->choices);
}

static void check_bounds(const Option *o, const char *value, double x) {
    if (x >= o->least && x <= o->most) return;
    if (o->most == ANY)
        die("--%s %s is out of range|give at least %.15g", o->name, value, o->least);
    die("--%s %s is out of range|give %.15g to %s%.15g", o->name, value, o->least,
        o->most == BELOW_1 ? "below " : "", o->most);
}

static void set(Options *options, const Option *o, const char *value) {
    void *field = (char *)options + o->at;
    switch (o->kind) {
    case TEXT: *(const char **)field = value; break;
    case INT:
        *(int64_t *)field = parse_int(o->name, value);
        check_bounds(o, value, (double)*(int64_t *)field);
        break;
    case REAL:
        *(double *)field = options_real(o->name, value);
        check_bounds(o, value, *(double *)field);
        break;
    case FLAG: *(int *)field = !strcmp(value, "on"); break;
    case CHOICE: *(int *)field = parse_choice(o, value); break;
    case FILES: break;
    }
}

// Adds the values from argv[first] up to the next option to a list; returns where that is. given: a
// value that was joined to the option's name by "=", or 0.
static int add_files(FileList *list, const Option *o, char **argv, int first, int argc,
                     const char *given) {
    int end = first;
    while (end < argc && strncmp(argv[end], "--", 2)) end++;
    int n = list->n + end - first + (given != 0);
    if (n == list->n) die("--%s needs a value|%s", o->name, takes(o));
    list->name = (const char **)realloc((void *)list->name, n * sizeof *list->name);
    if (!list->name) die("out of host memory for --%s|free memory", o->name);
    if (given) list->name[list->n++] = given;
    for (int i = first; i < end; i++) list->name[list->n++] = argv[i];
    return end;
}

Options options_parse(int argc, char **argv) {
    Options options;
    memset(&options, 0, sizeof options);
    for (int i = 0; i < ROWS; i++)
        if (table[i].name) set(&options, &table[i], table[i].value);
    for (int i = 1; i < argc;) {
        const char *word = argv[i++];
        if (!strcmp(word, "-h")) {
            options.help = 1;
            continue;
        }
        if (strncmp(word, "--", 2))
            die("%s is not an option|options begin with --; --help lists all", word);
        const char *equals = strchr(word, '=');
        const char *joined = equals ? equals + 1 : 0;
        char name[64];
        snprintf(name, sizeof name, "%.*s", equals ? (int)(equals - word - 2) : 60, word + 2);
        const Option *o = find(name);
        const char *next = i < argc ? argv[i] : 0;
        const char *value = joined ? joined : next;
        if (o->kind == FLAG) {
            int given = value && (!strcmp(value, "on") || !strcmp(value, "off"));
            if (joined && !given)
                die("--%s=%s|this option stands alone, or takes on or off", o->name, joined);
            set(&options, o, given ? value : "on");
            i += given && !joined;
        } else if (o->kind == FILES) {
            i = add_files((FileList *)((char *)&options + o->at), o, argv, i, argc, joined);
        } else {
            if (!value || (!joined && !strncmp(next, "--", 2)))
                die("--%s needs a value|%s", o->name, takes(o));
            set(&options, o, value);
            i += !joined;
        }
    }
    return options;
}

void options_free(Options *o) {
    free((void *)o->train.name);
    free((void *)o->val.name);
    free((void *)o->allow_changed.name);
    memset(o, 0, sizeof *o);
}

void options_help(FILE *out) {
    fprintf(out, "train_moe: trains Qwen3-MoE, every parameter.\n\n"
                 "  ./train_moe --init model/configs/tiny.json --train text.txt --steps 200 "
                 "--out runs/first\n"
                 "  mpirun -np 4 ./train_moe --model DIR --train 'shards/*.bin' --ep 2 --fsdp 2 "
                 "--out runs/second\n");
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

const char *options_choice(const Options *options, const char *name, char word[OPTION_WORD]) {
    const Option *o = find(name);
    const char *p = o->choices;
    for (int k = *(const int *)((const char *)options + o->at); k > 0; k--)
        p += strcspn(p, "|") + 1;
    snprintf(word, OPTION_WORD, "%.*s", (int)strcspn(p, "|"), p);
    return word;
}

static cJSON *json_value(const Options *options, const Option *o) {
    const void *field = (const char *)options + o->at;
    char word[OPTION_WORD];
    switch (o->kind) {
    case TEXT: return cJSON_CreateString(*(const char *const *)field);
    case INT: return cJSON_CreateNumber((double)*(const int64_t *)field);
    case REAL: return cJSON_CreateNumber(*(const double *)field);
    case FLAG: return cJSON_CreateBool(*(const int *)field);
    case CHOICE: return cJSON_CreateString(options_choice(options, o->name, word));
    case FILES: break;
    }
    const FileList *list = (const FileList *)field;
    cJSON *array = cJSON_CreateArray();
    for (int i = 0; i < list->n; i++)
        cJSON_AddItemToArray(array, cJSON_CreateString(list->name[i]));
    return array;
}

struct cJSON *options_json(const Options *options) {
    cJSON *json = cJSON_CreateObject();
    for (int i = 0; i < ROWS; i++)
        if (table[i].name && strcmp(table[i].name, "help"))
            cJSON_AddItemToObject(json, table[i].name, json_value(options, &table[i]));
    return json;
}
