-- A worker tells the state of a guild or a source; refused when it was assigned anew since.
-- KEYS[1] guild or broadcast record   KEYS[2] events
-- ARGV[1] generation under which the worker acts   ARGV[2] status, JSON   ARGV[3] event, JSON, '' for none   ARGV[4] cap of events
-- Returns 1, or 0: another generation stands there, nothing was changed.
if redis.call('HGET', KEYS[1], 'generation') ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], 'status', ARGV[2])
if ARGV[3] ~= '' then redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[4], '*', 'event', ARGV[3]) end
return 1
