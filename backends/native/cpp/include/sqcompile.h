/* sqcompile's native engine from C: open a .sqm file, run it, read its outputs.
 *
 *   sqc_model* model;
 *   sqc_session* session;
 *   sqc_status status = sqc_model_open("model.sqm", &model);
 *   if (status.code == SQC_OK) status = sqc_session_create(model, 2, &session);
 *   if (status.code == SQC_OK) status = sqc_session_run(session, inputs, input_count);
 *   if (status.code == SQC_OK) status = sqc_session_output(session, 0, &output);
 *   if (status.code != SQC_OK) fprintf(stderr, "%s\n", status.message);
 *
 * Nothing here throws, prints or aborts. A model may be shared by any number of sessions and threads; a session
 * is used by one thread at a time. SQCOMPILE_ISA in the environment forces an instruction set.
 */

#ifndef SQCOMPILE_H_
#define SQCOMPILE_H_

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define SQC_API __declspec(dllexport)
#else
#define SQC_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define SQC_MAX_RANK 8
#define SQC_MESSAGE_BYTES 208

typedef enum sqc_code {
  SQC_OK = 0,
  SQC_INVALID_ARGUMENT = 1, /* the caller's mistake: a shape, a count, an index out of range */
  SQC_UNSUPPORTED = 2,      /* right, but not here: this CPU or this build lacks it */
  SQC_OUT_OF_MEMORY = 3,
  SQC_INTERNAL = 4,
  SQC_DAMAGED = 5,          /* the file is cut off, changed, or of another kind */
  SQC_NOT_FOUND = 6         /* the file cannot be opened */
} sqc_code;

typedef struct sqc_status {
  sqc_code code;
  char message[SQC_MESSAGE_BYTES]; /* empty when ok */
} sqc_status;

typedef enum sqc_dtype {
  SQC_F32 = 0,
  SQC_I64 = 1,
  SQC_I32 = 2,
  SQC_I8 = 3,
  SQC_U8 = 4,
  SQC_BOOL = 5
} sqc_dtype;

/* Row-major, without gaps. Of inputs the caller owns the data; of outputs the session does. */
typedef struct sqc_tensor {
  sqc_dtype dtype;
  int32_t rank;
  int64_t shape[SQC_MAX_RANK];
  const void* data;
} sqc_tensor;

/* What a model takes or returns. The name is not terminated, and lives as long as the model. */
typedef struct sqc_port {
  const char* name;
  size_t name_bytes;
  sqc_dtype dtype;
  int32_t rank;
  int64_t shape[SQC_MAX_RANK]; /* -1 where a call decides */
} sqc_port;

typedef struct sqc_model sqc_model;
typedef struct sqc_session sqc_session;

/* Maps and checks a file, which must not be changed while the model is open. */
SQC_API sqc_status sqc_model_open(const char* path, sqc_model** model);
/* Sessions keep what they need: a model may be closed before them. Null is allowed. */
SQC_API void sqc_model_close(sqc_model* model);

SQC_API size_t sqc_model_input_count(const sqc_model* model);
SQC_API size_t sqc_model_output_count(const sqc_model* model);
SQC_API sqc_status sqc_model_input(const sqc_model* model, size_t index, sqc_port* port);
SQC_API sqc_status sqc_model_output(const sqc_model* model, size_t index, sqc_port* port);

/* threads: 1 to 256, or 0 for one a core. */
SQC_API sqc_status sqc_session_create(const sqc_model* model, int threads, sqc_session** session);
SQC_API void sqc_session_destroy(sqc_session* session);
SQC_API int sqc_session_threads(const sqc_session* session);
/* Name of the instruction set in use. */
SQC_API const char* sqc_session_isa(const sqc_session* session);

/* Runs the model on one tensor for each of its inputs, in order. */
SQC_API sqc_status sqc_session_run(sqc_session* session, const sqc_tensor* inputs, size_t count);
/* An output of the last run, if that succeeded; its data stays until the next run. */
SQC_API sqc_status sqc_session_output(const sqc_session* session, size_t index, sqc_tensor* output);

/* --- Language models: texts that are continued ---------------------------------------------------------- */

/* Rows of tokens with the cache of what they leave behind; used by one thread at a time. */
typedef struct sqc_generator sqc_generator;

/* How keys and values are kept: as they are, or in 8 bits with a scale for each position and head. */
typedef enum sqc_kv_type { SQC_KV_F32 = 0, SQC_KV_I8 = 1 } sqc_kv_type;

/* Tokens for one row, at least one. */
typedef struct sqc_text {
  int64_t row;
  const int64_t* tokens;
  int64_t count;
} sqc_text;

typedef struct sqc_sampling {
  int64_t max_new_tokens; /* for each row */
  float temperature;      /* 0: the most likely token; else logits are divided by it and one is drawn */
  int64_t top_k;          /* only among so many of the most likely; 0: among all */
  float top_p;            /* only among the fewest that together have this probability; 1: among all */
  uint64_t seed;          /* a row's draws depend on nothing but this, its number and its length */
  const int64_t* stop;    /* tokens that end a row */
  size_t stop_count;
} sqc_sampling;

/* Sees each token when it is chosen; 0 ends the whole generation. */
typedef int (*sqc_token_callback)(void* user, int64_t row, int64_t token);

/* Tokens that a row may have; 0 if the model does not generate. */
SQC_API int64_t sqc_model_limit(const sqc_model* model);
/* Tokens that can be looked up; 0 if that is not known. */
SQC_API int64_t sqc_model_vocabulary(const sqc_model* model);

/* threads as in sqc_session_create; rows: 1 to 4096; capacity: tokens that a row may have, up to the limit. */
SQC_API sqc_status sqc_generator_create(const sqc_model* model, int threads, int64_t rows, int64_t capacity,
                                        sqc_kv_type kv_type, sqc_generator** generator);
SQC_API void sqc_generator_destroy(sqc_generator* generator);

/* Appends tokens to rows, each named at most once. */
SQC_API sqc_status sqc_generator_feed(sqc_generator* generator, const sqc_text* texts, size_t count);
/* Logits behind the last token of a row; they stay until the row is fed or taken back. */
SQC_API sqc_status sqc_generator_logits(const sqc_generator* generator, int64_t row, const float** logits,
                                        int64_t* count);
/* Tokens that a row has; -1 if there is no such row. */
SQC_API int64_t sqc_generator_length(const sqc_generator* generator, int64_t row);
/* Forgets a row's tokens from `length` on. */
SQC_API sqc_status sqc_generator_rewind(sqc_generator* generator, int64_t row, int64_t length);
/* Feeds prompts, and chooses and feeds tokens until every row has had its number of them, or a stop. The last token
   of a row is not fed. */
SQC_API sqc_status sqc_generator_generate(sqc_generator* generator, const sqc_text* prompts, size_t count,
                                          const sqc_sampling* sampling, sqc_token_callback callback, void* user);

#ifdef __cplusplus
}
#endif

#endif /* SQCOMPILE_H_ */
